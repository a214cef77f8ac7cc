import { stat } from 'node:fs/promises';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ByteRange, MapEntry } from '../../lib/types.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { filefrag, qemuMap } from '../support/judges.js';
import { makePattern, sha256, totalLength, type Segment } from '../support/patterns.js';
import { requires } from '../support/requirements.js';
import {
  allocate,
  allocateHere,
  BTRFS,
  cliJson,
  emptyFile,
  EXT3,
  EXT4,
  keepReserved,
  KiB,
  MiB,
  missing,
  mixedSegments,
  MKFS_TOOLS,
  soak,
  TOOLS,
  XFS,
  type Level,
  type Storage,
} from './helpers.js';
import { add, libraryStretches, states, within, type Stretch } from './stretches.js';

const runnable = requires({ root: true, loop: true, tools: [...TOOLS, ...MKFS_TOOLS, 'chattr'] });
const seed = Number(process.env.THICKEN_SEED ?? 20_317);
const numRuns = soak ? 200 : 12;

interface Case {
  segments: Segment[];
  range: ByteRange;
  level: Level;
}

/** Patterns in whole blocks but for the tail, and any byte range in them. */
function cases(block: number, kinds: Segment['kind'][]): fc.Arbitrary<Case> {
  const segment = fc.record({
    kind: fc.constantFrom(...kinds),
    length: fc
      .oneof(fc.integer({ min: 1, max: 4 }), fc.integer({ min: 1, max: 400 }))
      .map((blocks) => blocks * block),
  });
  return fc
    .record({
      segments: fc.array(segment, { minLength: 1, maxLength: 16 }),
      tail: fc.oneof(fc.constant(0), fc.integer({ min: 1, max: block - 1 })),
      tailKind: fc.constantFrom<Segment['kind']>('data', 'hole'),
      from: fc.double({ min: 0, max: 1, noNaN: true }),
      share: fc.double({ min: 0, max: 1, noNaN: true }),
      level: fc.constantFrom<Level>('falloc', 'full'),
    })
    .map(({ segments, tail, tailKind, from, share, level }) => {
      const all = tail > 0 ? [...segments, { kind: tailKind, length: tail }] : segments;
      const size = totalLength(all);
      const offset = Math.floor(from * size);
      return { segments: all, range: { offset, length: Math.floor(share * (size - offset)) }, level };
    });
}

function effectiveOf({ offset, length }: ByteRange, block: number, size: number): ByteRange {
  if (length === 0) return { offset, length };
  const from = Math.floor(offset / block) * block;
  return { offset: from, length: Math.min(Math.ceil((offset + length) / block) * block, size) - from };
}

/** What qemu-img calls data; it takes reserved blocks for holes. */
async function qemuData(path: string): Promise<Stretch[]> {
  const found: Stretch[] = [];
  const { size } = await stat(path);
  for (const { start, length, data } of await qemuMap(path)) {
    const clipped = Math.min(length, size - start);
    add(found, { offset: start, length: clipped, state: data ? 'written' : 'hole' });
  }
  return found;
}

function asQemu(all: readonly Stretch[]): Stretch[] {
  const found: Stretch[] = [];
  for (const stretch of all) add(found, { ...stretch, state: stretch.state === 'written' ? 'written' : 'hole' });
  return found;
}

const storages: (Storage & { block: number })[] = [
  { ...EXT4, block: 4 * KiB },
  { ...EXT4, name: 'ext4 with blocks of 1 KiB', mkfsArgs: ['-b', '1024'], block: KiB },
  { ...XFS, block: 4 * KiB },
  { ...BTRFS, block: 4 * KiB },
  { ...EXT3, block: 4 * KiB },
];

describe.runIf(runnable).each(storages)('any range of any pattern on $name', (storage) => {
  let mounted: Filesystem;
  beforeAll(async () => {
    mounted = await mountFilesystem(storage);
    keepReserved(mounted);
  });
  afterAll(() => mounted.dispose());

  const kinds: Segment['kind'][] =
    storage.type === 'ext3-format' ? ['data', 'hole'] : ['data', 'hole', 'unwritten'];

  it('meets the level within, keeps its states outside, and its content everywhere', async () => {
    const property = fc.asyncProperty(cases(storage.block, kinds), async ({ segments, range, level }) => {
      const path = await emptyFile(mounted, storage);
      await makePattern(path, segments);
      const { size } = await stat(path);
      const before = await states(path);
      // Before anything reads the file: a cached page over a reserved block counts as data.
      if (size % 512 === 0) expect(await qemuData(path)).toEqual(asQemu(before));
      expect(await libraryStretches(path)).toEqual(before);
      const content = await sha256(path);

      const result = await allocateHere(path, { ...range, preallocation: level });

      const effective = effectiveOf(range, storage.block, size);
      expect(result).toMatchObject({ requested: range, effective, verified: true });
      const after = await states(path);
      const end = effective.offset + effective.length;
      for (const outside of [
        { offset: 0, length: effective.offset },
        { offset: end, length: size - end },
      ]) {
        expect(within(after, outside)).toEqual(within(before, outside));
      }
      expect(await missing(path, level, effective)).toEqual([]);
      expect(await libraryStretches(path)).toEqual(after);
      expect((await stat(path)).size).toBe(size);
      expect(await sha256(path)).toBe(content);
      const again = await allocateHere(path, { ...range, preallocation: level });
      expect(again).toMatchObject({ allocated: 0, skipped: effective.length });
    });
    await fc.assert(property, { seed, numRuns, endOnFailure: !soak });
  });
});

describe.runIf(runnable)('a range through the command line', () => {
  let mounted: Filesystem;
  beforeAll(async () => {
    mounted = await mountFilesystem(EXT4);
    keepReserved(mounted);
  });
  afterAll(() => mounted.dispose());

  it.each(['falloc', 'full'] as const)('is rounded outward, and both ranges are named (%s)', async (level) => {
    const path = `${mounted.path}/${level}.raw`;
    await makePattern(path, [{ kind: 'hole', length: 16 * MiB + 5 }]);
    const range = ['--offset', '1M', '--length', '4097', '--preallocation', level];
    expect(await allocate(path, ...range)).toMatchObject({
      requested: { offset: MiB, length: 4097 },
      effective: { offset: MiB, length: 8 * KiB },
      before: { allocated: 0 },
      after: { allocated: 8 * KiB },
      allocated: 8 * KiB,
    });
    expect((await filefrag(path)).map(({ offset, length }) => ({ offset, length }))).toEqual([
      { offset: MiB, length: 8 * KiB },
    ]);
    const tail = await allocate(path, '--offset', String(16 * MiB + 4), '--preallocation', level);
    expect(tail).toMatchObject({
      requested: { offset: 16 * MiB + 4, length: 1 },
      effective: { offset: 16 * MiB, length: 5 },
      allocated: 5,
    });
  });

  it('of no length does nothing', async () => {
    const path = `${mounted.path}/none.raw`;
    await makePattern(path, [{ kind: 'hole', length: MiB }]);
    for (const offset of [0, 5, MiB]) {
      const result = await allocate(path, '--offset', String(offset), '--length', '0');
      expect(result).toMatchObject({ allocated: 0, skipped: 0, plan: [], verified: true });
    }
    expect(await filefrag(path)).toEqual([]);
  });

  it('map gives the fields of qemu-img map, split where the host’s state changes', async () => {
    const path = `${mounted.path}/map.raw`;
    await makePattern(path, mixedSegments({ tail: 512 }));
    const expected = await states(path);
    const qemu = await qemuMap(path);
    const { document, status } = await cliJson<MapEntry[]>(['map', path]);
    expect(status).toBe(0);
    expect(document.map(({ start, length, host }) => ({ offset: start, length, state: host }))).toEqual(expected);
    for (const entry of document) {
      const { host: _host, start, length, ...fields } = entry;
      const same = qemu.find((other) => other.start <= start && start + length <= other.start + other.length);
      expect(same, JSON.stringify(entry)).toBeDefined();
      const { start: from, length: _length, offset, ...others } = same!;
      expect(fields).toEqual({ ...others, offset: offset! + (start - from) });
    }
  });

  it('map of a range is cut at its ends', async () => {
    const path = `${mounted.path}/cut.raw`;
    await makePattern(path, mixedSegments());
    const range = ['--offset', String(MiB + 100), '--length', '100000'];
    const { document } = await cliJson<MapEntry[]>(['map', path, ...range]);
    expect(document[0]?.start).toBe(MiB + 100);
    const last = document.at(-1)!;
    expect(last.start + last.length).toBe(MiB + 100_100);
  });
});
