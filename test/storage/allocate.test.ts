import { writeFileSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { AllocationResult, Verdict } from '../../lib/types.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { hostBytes } from '../support/judges.js';
import { makePattern, segmentsChecksum, sha256 } from '../support/patterns.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import {
  allocate,
  allocateHere,
  BTRFS,
  bytesOf,
  cliJson,
  emptyFile,
  EXT3,
  EXT4,
  KiB,
  makeSparse,
  MiB,
  missing,
  mixedSegments,
  MKFS_TOOLS,
  TMPFS,
  TOOLS,
  XFS,
  type Level,
  type Storage,
} from './helpers.js';

const storages: Storage[] = [
  EXT4,
  { ...EXT4, name: 'ext4 with blocks of 1 KiB', mkfsArgs: ['-b', '1024'] },
  { ...EXT4, name: 'ext4 on sectors of 4096 bytes', sectorSize: 4096 },
  XFS,
  { ...XFS, name: 'xfs with blocks of 1 KiB', mkfsArgs: ['-b', 'size=1024'] },
  { ...XFS, name: 'xfs on sectors of 4096 bytes', sectorSize: 4096 },
  BTRFS,
  { ...BTRFS, name: 'btrfs with NOCOW', nocow: true },
  EXT3,
  { ...EXT3, name: 'ext3-format with blocks of 1 KiB', mkfsArgs: ['-b', '1024'] },
  TMPFS,
];

const runnable = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, ...MKFS_TOOLS, 'chattr', 'e2fsck'],
});

function promises(storage: Storage): boolean {
  return storage.type !== 'btrfs' || storage.nocow === true;
}

function reserves(storage: Storage): boolean {
  return storage.type !== 'ext3-format';
}

/** The bytes that count as met before a run, by the independent reader. */
async function metBefore(path: string, level: Level): Promise<number> {
  return (await stat(path)).size - bytesOf(await missing(path, level));
}

/**
 * SEEK_HOLE on tmpfs calls a reserved page a hole (Linux 6.18), and there is no FIEMAP: only the
 * count of blocks tells.
 */
function cannotTell(storage: Storage, level: Level): boolean {
  return storage.type === 'tmpfs' && level === 'falloc';
}

async function expectBlocks(path: string, result: AllocationResult): Promise<void> {
  const { size } = await stat(path);
  expect(await hostBytes(path)).toBeGreaterThanOrEqual(size);
  expect(result).toMatchObject({ target: path, format: 'raw', effective: { offset: 0, length: size } });
  expect(result.verified).not.toBe(false);
  expect(result.guarantee).toBe(result.verified === true);
}

async function expectAllocated(
  path: string,
  level: Level,
  { result, before, storage }: { result: AllocationResult; before: number; storage: Storage },
): Promise<void> {
  const { size } = await stat(path);
  const whole = { offset: 0, length: size };
  if (cannotTell(storage, level)) return expectBlocks(path, result);
  expect(result).toMatchObject({
    target: path,
    format: 'raw',
    preallocation: level,
    requested: whole,
    effective: whole,
    before: { allocated: before },
    after: { allocated: size },
    allocated: size - before,
    skipped: before,
    verified: true,
    guarantee: promises(storage),
  });
  expect(await missing(path, level)).toEqual([]);
  expect(await hostBytes(path)).toBeGreaterThanOrEqual(size < 2 * KiB ? 0 : size);
}

describe.runIf(runnable)('a file at rest', () => {
  describe.each(storages)('on $name', (storage) => {
    let mounted: Filesystem;
    beforeAll(async () => {
      mounted = await mountFilesystem(storage);
    });
    afterAll(() => mounted.dispose());

    it.each(['falloc', 'full'] as const)('keeps its data and has no hole after %s', async (level) => {
      const segments = mixedSegments({ reserve: reserves(storage) });
      const path = await emptyFile(mounted, storage, `mixed-${level}.raw`);
      await makePattern(path, segments);
      const [before, content, data] = [
        await metBefore(path, level),
        await sha256(path),
        await segmentsChecksum(path, segments),
      ];
      const result = await allocate(path, '--preallocation', level);
      await expectAllocated(path, level, { result, before, storage });
      expect(await sha256(path)).toBe(content);
      expect(await segmentsChecksum(path, segments)).toBe(data);

      const again = await allocate(path, '--preallocation', level);
      await expectAllocated(path, level, { result: again, before: await metBefore(path, level), storage });
      expect(again.allocated).toBe(0);
      const verdict = await cliJson<Verdict>(['verify', path, '--preallocation', level]);
      const satisfied = promises(storage) && again.verified === true;
      expect(verdict.status).toBe(satisfied ? 0 : 3);
      expect(verdict.document).toMatchObject({ target: path, satisfied });
      if (cannotTell(storage, level)) return;
      expect(again.plan).toEqual([]);
      expect(verdict.document.missing).toEqual([]);
    });

    it('is raised from falloc to full without a change of its content', async () => {
      const segments = mixedSegments({ reserve: reserves(storage), tail: 4095 });
      const path = await emptyFile(mounted, storage, 'raised.raw');
      await makePattern(path, segments, 7);
      const content = await sha256(path);
      await allocate(path);
      const result = await allocate(path, '--preallocation', 'full');
      expect(result.verified).toBe(true);
      expect(await missing(path, 'full')).toEqual([]);
      expect(await sha256(path)).toBe(content);
    });

    it.each(['falloc', 'full'] as const)('may be of a single byte, hole or not (%s)', async (level) => {
      for (const content of ['', 'x']) {
        const path = await emptyFile(mounted, storage, `byte-${level}-${content}.raw`);
        if (content) writeFileSync(path, content);
        else makeSparse(path, 1);
        const before = await metBefore(path, level);
        const result = await allocateHere(path, { preallocation: level });
        await expectAllocated(path, level, { result, before, storage });
        expect((await stat(path)).size).toBe(1);
        expect(await sha256(path)).toBe(await sha256(reference(path, content || '\0')));
      }
    });

    it('may be empty: nothing is done to it', async () => {
      const path = await emptyFile(mounted, storage, 'empty.raw');
      const result = await allocate(path, '--preallocation', 'full');
      expect(result).toMatchObject({
        effective: { offset: 0, length: 0 },
        allocated: 0,
        skipped: 0,
        plan: [],
        verified: true,
      });
      expect(await hostBytes(path)).toBe(0);
    });

    it.each(['falloc', 'full'] as const)('may be one hole of an odd length (%s)', async (level) => {
      for (const size of [511, 513, 4095, 4097, 3 * MiB + 1]) {
        const path = await emptyFile(mounted, storage, `hole-${level}-${size}.raw`);
        makeSparse(path, size);
        const result = await allocateHere(path, { preallocation: level });
        await expectAllocated(path, level, { result, before: 0, storage });
        expect(await sha256(path)).toBe(await sha256(reference(path, Buffer.alloc(size))));
      }
    });

    it('is left alone by a dry run', async () => {
      const path = await emptyFile(mounted, storage, 'dry.raw');
      makeSparse(path, MiB);
      const result = await allocate(path, '--dry-run');
      expect(result).toMatchObject({ after: null, verified: null, allocated: 0 });
      expect(bytesOf(result.plan)).toBe(MiB);
      expect(await hostBytes(path)).toBe(0);
    });
  });

  it('has no guarantee on btrfs without NOCOW, says why, and verify is not satisfied', async () => {
    await using mounted = await mountFilesystem(BTRFS);
    const path = await emptyFile(mounted, BTRFS);
    makeSparse(path, 4 * MiB);
    const result = await allocate(path);
    expect(result).toMatchObject({ verified: true, guarantee: false });
    expect(result.warnings.join('\n')).toMatch(/copies on write/);
    const verdict = await cliJson<Verdict>(['verify', path]);
    expect(verdict.status).toBe(3);
    expect(verdict.document.satisfied).toBe(false);
    expect(verdict.document.warnings.join('\n')).toMatch(/copies on write/);
  });

  it('has no guarantee on btrfs with compression', async () => {
    await using mounted = await mountFilesystem({ ...BTRFS, mountOptions: ['compress-force=zstd'] });
    const path = await emptyFile(mounted, BTRFS);
    await makePattern(path, [
      { kind: 'data', length: 256 * KiB },
      { kind: 'hole', length: MiB },
    ]);
    const content = await sha256(path);
    expect(await allocate(path)).toMatchObject({ guarantee: false });
    expect(await sha256(path)).toBe(content);
    expect((await cliJson(['verify', path])).status).toBe(3);
  });

  it('leaves its file system sound (e2fsck)', async () => {
    for (const storage of [EXT4, EXT3]) {
      const mounted = await mountFilesystem(storage);
      try {
        for (const level of ['falloc', 'full'] as const) {
          const path = `${mounted.path}/${level}.raw`;
          await makePattern(path, mixedSegments({ reserve: reserves(storage) }));
          await allocate(path, '--preallocation', level);
        }
        await mustRun('umount', [mounted.path]);
        await mustRun('e2fsck', ['-fn', mounted.device!]);
        await mustRun('mount', [mounted.device!, mounted.path]);
      } finally {
        await mounted.dispose();
      }
    }
  });

  it('of several targets each has its result, and the highest status counts', async () => {
    await using mounted = await mountFilesystem(EXT4);
    const paths = ['a', 'b'].map((name) => makeSparse(`${mounted.path}/${name}.raw`, MiB));
    const targets = [paths[0]!, `${mounted.path}/none.raw`, paths[1]!];
    const outcome = await cliJson<Partial<AllocationResult & { error: { code: string } }>[]>([
      'allocate',
      ...targets,
    ]);
    expect(outcome.status).toBe(1);
    expect(outcome.document.map(({ target }) => target)).toEqual(targets);
    expect(outcome.document[0]).toMatchObject({ allocated: MiB, verified: true });
    expect(outcome.document[1]).toMatchObject({ error: { code: 'ENOENT' } });
    expect(outcome.document[2]).toMatchObject({ allocated: MiB, verified: true });
  });
});

/** A plain copy of what a file should read as, beside it. */
function reference(path: string, content: string | Buffer): string {
  writeFileSync(`${path}.reference`, content);
  return `${path}.reference`;
}
