import { mkdirSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { mountFilesystem, type FilesystemType } from '../support/filesystems.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { buildAddon, runSanitized } from './sanitized.js';

const soak = Boolean(process.env.THICKEN_SOAK);
const able = requires({ root: true, loop: true, tools: ['cmake', 'g++', 'mkfs.ext4', 'mkfs.xfs', 'qemu-img', 'qemu-io'] });
const types: FilesystemType[] = ['ext4', 'xfs', 'ext3-format'];
const suite = soak ? ['test/storage'] : ['test/storage/allocate.test.ts'];

describe.runIf(able)('the addon under ASan and UBSan', { timeout: 1_800_000 }, () => {
  let addon: string;

  beforeAll(async () => {
    addon = await buildAddon();
  }, 600_000);

  it.each(types)('opens, scans, allocates, cancels and closes on %s', async (type) => {
    await using filesystem = await mountFilesystem({ type, size: 512 * 2 ** 20 });
    const script = ['test/native/workload.mjs', filesystem.path];
    const outcome = await runSanitized(addon, script, { ROUNDS: soak ? '1000' : '60' });
    expect(outcome).toMatchObject({ status: 0, reports: '', stdout: expect.stringMatching(/ rounds/) as string });
  });

  it('passes the tests of storage', async () => {
    // Files of its own: the same names are in use in this run.
    const folder = scratchPath('suite');
    mkdirSync(folder);
    const vitest = ['node_modules/vitest/vitest.mjs', 'run', '--cache=false', ...suite];
    const outcome = await runSanitized(addon, vitest, { THICKEN_SCRATCH: folder });
    expect(outcome.reports).toBe('');
    expect(outcome.status, outcome.stdout + outcome.stderr).toBe(0);
  });
});
