import { existsSync, truncateSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { attachLoop, backingFile, writePartitionTable } from './loop.js';
import { run } from './processes.js';
import { requires } from './requirements.js';
import { scratchPath } from './scratch.js';

const MiB = 1024 * 1024;

function sparseFile(): string {
  const file = scratchPath('disk.raw');
  writeFileSync(file, '');
  truncateSync(file, 16 * MiB);
  return file;
}

const blockdev = async (option: string, device: string): Promise<number> =>
  Number((await run('blockdev', [option, device])).stdout);

const able = requires({ root: true, loop: true, tools: ['losetup', 'blockdev', 'partx'] });

describe.runIf(able)('attachLoop', () => {
  it.each([512, 4096] as const)('gives a device of %i-byte sectors', async (sectorSize) => {
    await using loop = await attachLoop({ file: sparseFile(), sectorSize });
    expect(await blockdev('--getss', loop.device)).toBe(sectorSize);
    expect(await blockdev('--getsize64', loop.device)).toBe(16 * MiB);
  });

  it.each([512, 4096] as const)('finds the partitions at %i-byte sectors', async (sectorSize) => {
    const file = sparseFile();
    const ranges = [
      { offset: MiB, length: 4 * MiB },
      { offset: 8 * MiB, length: 8 * MiB },
    ];
    await writePartitionTable(file, ranges, sectorSize);
    await using loop = await attachLoop({ file, sectorSize, partitioned: true });
    expect(loop.partitions).toEqual([`${loop.device}p1`, `${loop.device}p2`]);
    const sizes = loop.partitions.map((partition) => blockdev('--getsize64', partition));
    expect(await Promise.all(sizes)).toEqual([4 * MiB, 8 * MiB]);
    await loop.dispose();
    expect(loop.partitions.filter((partition) => existsSync(partition))).toEqual([]);
  });

  it('can be read-only', async () => {
    await using loop = await attachLoop({ file: sparseFile(), readOnly: true });
    expect(await blockdev('--getro', loop.device)).toBe(1);
  });

  it('detaches once, and never a device that serves another file', async () => {
    const first = await attachLoop({ file: sparseFile() });
    await run('losetup', ['--detach', first.device]);
    const second = await attachLoop({ file: sparseFile() });
    await first.dispose();
    expect(backingFile(second.device)).toBe(second.file);
    await second.dispose();
    await second.dispose();
    expect(backingFile(second.device)).not.toBe(second.file);
  });
});
