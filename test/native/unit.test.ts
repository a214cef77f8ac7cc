import { mkdirSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { mountFilesystem, type FilesystemType } from '../support/filesystems.js';
import { copyPublicly, giveTo, POWER_TOOLS, POWERS, runAs } from '../support/powers.js';
import { run, type Outcome } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { buildUnitTests } from './sanitized.js';

const types: FilesystemType[] = ['ext4', 'xfs', 'btrfs', 'ext3-format', 'tmpfs'];
const able = requires({
  root: true,
  loop: true,
  tools: ['cmake', 'g++', 'mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs', ...POWER_TOOLS],
});

// What the file system can't do is not tested there, so it must be what is known of it.
const unsupported: Record<FilesystemType, string[]> = {
  ext4: [],
  xfs: [],
  btrfs: ['method 2'],
  'ext3-format': ['fallocate'],
  tmpfs: ['method 0', 'method 2'],
};

describe.runIf(able)('C++ unit tests under ASan and UBSan', () => {
  it.each(types)('pass on %s', { timeout: 600_000 }, async (type) => {
    const program = await buildUnitTests();
    await using filesystem = await mountFilesystem({ type, size: 512 * 2 ** 20 });
    const { stdout } = expectPassed(await run(program, [filesystem.path]), 'permission');
    const named = [...stdout.matchAll(/^unsupported here: (.*)$/gm)].map(([, what]) => what);
    expect([...new Set(named)].sort()).toEqual(unsupported[type]);
  });

  it.each(POWERS)('of the gate pass by $name', { timeout: 600_000 }, async (power) => {
    const program = copyPublicly(await buildUnitTests());
    const folder = scratchPath('files');
    mkdirSync(folder);
    giveTo(power, folder);
    expectPassed(await runAs(power, program, [folder, 'gate']), power.gate);
  });
});

function expectPassed(outcome: Outcome, gate: string): Outcome {
  expect(outcome.stderr).toBe('');
  expect(outcome.stdout).toMatch(/^[1-9]\d* tests, 0 failed$/m);
  expect(outcome.stdout).toMatch(new RegExp(`^gate by ${gate}$`, 'm'));
  expect(outcome.status).toBe(0);
  return outcome;
}
