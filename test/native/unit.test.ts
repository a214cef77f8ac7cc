import { describe, expect, it } from 'vitest';
import { mountFilesystem, type FilesystemType } from '../support/filesystems.js';
import { run } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { buildUnitTests } from './sanitized.js';

const types: FilesystemType[] = ['ext4', 'xfs', 'btrfs', 'ext3-format', 'tmpfs'];
const able = requires({
  root: true,
  loop: true,
  tools: ['cmake', 'g++', 'mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs'],
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
    const { status, stdout, stderr } = await run(program, [filesystem.path]);
    expect(stderr).toBe('');
    expect(stdout).toMatch(/^[1-9]\d* tests, 0 failed$/m);
    expect(status).toBe(0);
    const named = [...stdout.matchAll(/^unsupported here: (.*)$/gm)].map(([, what]) => what);
    expect([...new Set(named)].sort()).toEqual(unsupported[type]);
  });
});
