import { existsSync, readFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { mountFilesystem, type FilesystemType } from './filesystems.js';
import { filefrag, hostBytes } from './judges.js';
import { backingFile } from './loop.js';
import { makePattern, type Segment } from './patterns.js';
import { run } from './processes.js';
import { requires } from './requirements.js';
import { scratch } from './scratch.js';

const MiB = 1024 * 1024;
const size = 400 * MiB;
const segments: Segment[] = [
  { kind: 'hole', length: MiB },
  { kind: 'data', length: MiB },
  { kind: 'hole', length: 2 * MiB },
];
const able = requires({
  root: true,
  loop: true,
  tools: ['mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs', 'losetup', 'filefrag', 'xfs_io', 'fallocate'],
});

const isMounted = (path: string): boolean => readFileSync('/proc/mounts', 'utf8').includes(` ${path} `);

describe.runIf(able)('mountFilesystem', () => {
  for (const type of ['ext4', 'xfs', 'btrfs'] as FilesystemType[]) {
    it(`gives a ${type} with holes, fallocate and FIEMAP`, async () => {
      await using filesystem = await mountFilesystem({ type, size });
      const file = join(filesystem.path, 'file');
      await makePattern(file, [...segments, { kind: 'unwritten', length: MiB }]);
      const extents = (await filefrag(file)).map(({ offset, length, flags }) => ({
        offset,
        length,
        unwritten: flags.includes('unwritten'),
      }));
      expect(extents).toEqual([
        { offset: MiB, length: MiB, unwritten: false },
        { offset: 4 * MiB, length: MiB, unwritten: true },
      ]);
      expect(await hostBytes(file)).toBe(2 * MiB);
    });
  }

  it('gives an ext3 format whose files refuse fallocate and have a FIEMAP', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext3-format', size });
    const file = join(filesystem.path, 'file');
    await makePattern(file, segments);
    const { status, stderr } = await run('fallocate', ['-n', '-l', String(4 * MiB), file]);
    expect([status, stderr]).toEqual([1, expect.stringMatching(/unsupported|not supported/i)]);
    const extents = await filefrag(file);
    expect(extents.at(0)?.offset).toBe(MiB);
    expect(extents.reduce((sum, { length }) => sum + length, 0)).toBe(MiB);
  });

  it('gives a tmpfs of the size asked for', async () => {
    await using filesystem = await mountFilesystem({ type: 'tmpfs', size: 8 * MiB });
    expect(filesystem).toMatchObject({ type: 'tmpfs', device: null, image: null });
    const { status } = await run('fallocate', ['-l', String(9 * MiB), join(filesystem.path, 'file')]);
    expect(status).toBe(1);
  });

  it('makes reflinks on xfs', async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size });
    const file = join(filesystem.path, 'file');
    await makePattern(file, segments);
    await run('cp', ['--reflink=always', file, `${file}-copy`]);
    expect((await filefrag(file)).every(({ flags }) => flags.includes('shared'))).toBe(true);
  });

  it('leaves nothing behind when the body throws', async () => {
    const places: (string | null)[] = [];
    const body = async (): Promise<void> => {
      await using filesystem = await mountFilesystem({ type: 'ext4', size });
      places.push(filesystem.path, filesystem.image, filesystem.device);
      throw new Error('body');
    };
    await expect(body()).rejects.toThrow('body');
    const [path, image, device] = places as string[];
    expect([existsSync(path!), existsSync(image!), isMounted(path!)]).toEqual([false, false, false]);
    expect(backingFile(device!)).not.toBe(image);
  });

  it('leaves nothing behind when mkfs or mount fails', async () => {
    const loops = async (): Promise<string> => (await run('losetup', ['-n', '-O', 'BACK-FILE'])).stdout;
    const noFormat = mountFilesystem({ type: 'ext4', size, mkfsArgs: ['-O', 'nonsense'] });
    await expect(noFormat).rejects.toThrow('mkfs.ext4');
    const noMount = mountFilesystem({ type: 'xfs', size, mountOptions: ['nonsense'] });
    await expect(noMount).rejects.toThrow('mount');
    expect(await loops()).not.toContain(scratch());
  });

  it('waits for a file that is still open', async () => {
    const filesystem = await mountFilesystem({ type: 'ext4', size });
    const handle = await open(join(filesystem.path, 'file'), 'w');
    setTimeout(() => void handle.close(), 300);
    await filesystem.dispose();
    expect(isMounted(filesystem.path)).toBe(false);
  });
});
