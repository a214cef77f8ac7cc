/** A reader of a map that has seen enough. */
import { describe, expect, it } from 'vitest';
import { makePattern } from '../support/patterns.js';
import { cliMain, run } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { expectClean, KiB, makeDisk, startHost, TOOLS } from './rig.js';

describe.runIf(requires({ tools: TOOLS }))('a map of a disk in use, whose reader goes', () => {
  it('leaves nothing in QEMU', async () => {
    // More than a pipe holds.
    const pair = [{ kind: 'data', length: 4 * KiB }, { kind: 'hole', length: 4 * KiB }] as const;
    const template = scratchPath('template.raw');
    await makePattern(template, Array.from({ length: 3000 }, () => pair).flat());
    const { overlay } = await makeDisk(template);
    await using host = await startHost({ disks: [overlay] });
    const map = `"${process.execPath}" "${cliMain}" map --json --qmp "${host.monitors[0]}" --device disk0`;
    const outcome = await run('bash', ['-c', `set -o pipefail; ${map} | head -c 1000 | wc -c`], { env: host.env });
    expect(outcome).toMatchObject({ status: 0, stdout: '1000\n', stderr: '' });
    await expectClean(host);
    await host.quit();
  });
});
