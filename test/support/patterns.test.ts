import { openSync, closeSync, writeSync } from 'node:fs';
import { copyFile, readFile, stat } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import { filefrag, hostBytes, qemuCompare, qemuMap } from './judges.js';
import {
  makePattern,
  place,
  segmentsChecksum,
  sha256,
  sparseChecksum,
  totalLength,
  type Segment,
} from './patterns.js';
import { mustRun } from './processes.js';
import { requires } from './requirements.js';
import { scratchPath } from './scratch.js';

const KiB = 1024;
const MiB = KiB * KiB;
const segments: Segment[] = [
  { kind: 'data', length: 3 * MiB },
  { kind: 'hole', length: MiB },
  { kind: 'unwritten', length: 64 * KiB },
  { kind: 'hole', length: 64 * KiB },
  { kind: 'data', length: 4 * KiB },
  { kind: 'hole', length: 100 },
];

async function made(seed?: number): Promise<string> {
  const path = scratchPath('pattern.raw');
  await makePattern(path, segments, seed);
  return path;
}

function overwrite(path: string, offset: number, bytes: Buffer): void {
  const descriptor = openSync(path, 'r+');
  writeSync(descriptor, bytes, 0, bytes.length, offset);
  closeSync(descriptor);
}

describe.runIf(requires({ tools: ['xfs_io', 'filefrag', 'qemu-img', 'fallocate'] }))('makePattern', () => {
  it('lays the segments out as asked', async () => {
    const path = await made();
    const extents = await filefrag(path);
    const unwritten = extents.filter(({ flags }) => flags.includes('unwritten'));
    expect(unwritten).toMatchObject([{ offset: 4 * MiB, length: 64 * KiB }]);
    expect(extents.reduce((sum, { length }) => sum + length, 0)).toBe(3 * MiB + 68 * KiB);
    expect(await hostBytes(path)).toBe(3 * MiB + 68 * KiB);
    expect((await stat(path)).size).toBe(totalLength(segments));
    expect((await qemuMap(path)).filter(({ data }) => data)).toMatchObject([
      { start: 0, length: 3 * MiB },
      { start: 4 * MiB + 128 * KiB, length: 4 * KiB },
    ]);
  });

  it('gives the same content for the same seed only', async () => {
    const paths = [await made(1), await made(1), await made(2)] as const;
    expect(await sha256(paths[0])).toBe(await sha256(paths[1]));
    expect(await sha256(paths[0])).not.toBe(await sha256(paths[2]));
    expect(await qemuCompare(paths[0], paths[1])).toBe(true);
    expect(await qemuCompare(paths[0], paths[2])).toBe(false);
  });

  it('never repeats a MiB', async () => {
    const bytes = await readFile(await made());
    expect(bytes.subarray(0, MiB).equals(bytes.subarray(MiB, 2 * MiB))).toBe(false);
  });

  it('places segments one after the other', () => {
    expect(place(segments).map(({ offset }) => offset).slice(0, 3)).toEqual([0, 3 * MiB, 4 * MiB]);
  });
});

describe.runIf(requires({ tools: ['xfs_io', 'qemu-img', 'fallocate'] }))('checksums', () => {
  const all = async (path: string): Promise<string[]> => [
    await sha256(path),
    await segmentsChecksum(path, segments),
    await sparseChecksum(path),
  ];

  it('stay when zeros are allocated, reserved or written', async () => {
    const path = await made();
    const before = await all(path);
    await mustRun('fallocate', ['-n', '-l', String(totalLength(segments)), path]);
    expect(await all(path)).toEqual(before);
    overwrite(path, 3 * MiB, Buffer.alloc(MiB));
    expect(await all(path)).toEqual(before);
  });

  it('tell a changed byte', async () => {
    const path = await made();
    const before = await all(path);
    const changed = scratchPath('changed.raw');
    await copyFile(path, changed);
    const byte = (await readFile(path))[5000] ?? 0;
    overwrite(changed, 5000, Buffer.of(byte ^ 1));
    (await all(changed)).forEach((sum, index) => expect(sum).not.toBe(before[index]));
  });

  it('tell a byte in a former hole, given the whole file', async () => {
    const path = await made();
    const before = await all(path);
    overwrite(path, 3 * MiB + 5, Buffer.of(1));
    const after = await all(path);
    expect(after.map((sum, index) => sum === before[index])).toEqual([false, true, false]);
  });
});
