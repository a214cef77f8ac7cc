import { stat } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ImageInfo, Verdict } from '../../lib/types.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { filefrag, type FilefragExtent } from '../support/judges.js';
import { makePattern, sha256 } from '../support/patterns.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import {
  allocate,
  BTRFS,
  bytesOf,
  cliJson,
  emptyFile,
  MiB,
  missing,
  TOOLS,
  XFS,
  type Level,
} from './helpers.js';

const runnable = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, 'mkfs.xfs', 'mkfs.btrfs', 'btrfs', 'chattr', 'dd', 'cp'],
});

const segments = [
  { kind: 'data', length: 6 * MiB },
  { kind: 'hole', length: 2 * MiB },
  { kind: 'unwritten', length: MiB },
  { kind: 'data', length: 3 * MiB },
  { kind: 'hole', length: 4 * MiB + 100 },
] as const;

async function sharedBytes(path: string): Promise<number> {
  await mustRun('sync', ['-f', path]);
  return bytesOf((await filefrag(path)).filter(({ flags }) => flags.includes('shared')));
}

/** A copy whose first half shares its extents with the original; the second has been rewritten. */
async function halfShared(folder: string, name: string): Promise<{ original: string; copy: string }> {
  const [original, copy] = [`${folder}/${name}.raw`, `${folder}/${name}-copy.raw`];
  await makePattern(original, segments);
  await mustRun('cp', ['--reflink=always', original, copy]);
  const rewrite = [`if=${original}`, `of=${copy}`, 'bs=1M', 'skip=3', 'seek=3', 'count=3'];
  await mustRun('dd', [...rewrite, 'conv=notrunc,fsync']);
  return { original, copy };
}

describe.runIf(runnable)('a reflink copy on xfs, half shared', () => {
  let mounted: Filesystem;
  beforeAll(async () => {
    mounted = await mountFilesystem(XFS);
  });
  afterAll(() => mounted.dispose());

  it.each(['falloc', 'full'] as const)('has no shared extent after %s, and the same data', async (level) => {
    const { original, copy } = await halfShared(mounted.path, level);
    const content = await sha256(original);
    const before = await filefrag(original);
    const shared = await sharedBytes(copy);
    expect(shared).toBe(6 * MiB);

    const verdict = await cliJson<Verdict>(['verify', copy, '--preallocation', level]);
    expect(verdict.status).toBe(3);
    expect(verdict.document.satisfied).toBe(false);
    const why = verdict.document.missing.filter((range) => /shared/.test(range.why));
    expect(bytesOf(why)).toBe(shared);

    const result = await allocate(copy, '--preallocation', level);
    expect(result).toMatchObject({ verified: true, guarantee: true });
    expect(result.plan.some(({ route }) => route === 'unshare')).toBe(true);
    await expectThick(copy, level);
    expect(await sha256(copy)).toBe(content);
    expect(await sha256(original)).toBe(content);
    // The original keeps its blocks: it is the copy that got new ones.
    expect(runs(await filefrag(original))).toEqual(runs(before));
    expect((await cliJson(['verify', copy, '--preallocation', level])).status).toBe(0);
  });

  it('has only a range unshared, when a range is asked for', async () => {
    const { original, copy } = await halfShared(mounted.path, 'range');
    const content = await sha256(original);
    const range = ['--offset', String(MiB + 1), '--length', String(MiB - 2)];
    expect(await allocate(copy, ...range)).toMatchObject({
      effective: { offset: MiB, length: MiB },
      allocated: MiB,
      verified: true,
    });
    expect(await sharedBytes(copy)).toBe(5 * MiB);
    expect(await sha256(copy)).toBe(content);
  });

  it('is told of by info', async () => {
    const { copy } = await halfShared(mounted.path, 'info');
    const info = await cliJson<ImageInfo>(['info', copy]);
    expect(info.document.filesystem).toMatchObject({ type: 'xfs', reflinked: true });
    expect(info.document.needed.falloc).toBeGreaterThanOrEqual(6 * MiB);
  });

  async function expectThick(path: string, level: Level): Promise<void> {
    expect(await sharedBytes(path)).toBe(0);
    expect(await missing(path, level)).toEqual([]);
  }

  /** Extents that follow each other on disk as one: sharing alone splits them. */
  function runs(extents: readonly FilefragExtent[]) {
    const found: { offset: number; physical: number; length: number }[] = [];
    for (const { offset, physical, length, flags } of extents) {
      const last = found.at(-1);
      const goesOn = last && last.offset + last.length === offset && last.physical + last.length === physical;
      if (goesOn && !flags.includes('unwritten')) last.length += length;
      else found.push({ offset, physical, length });
    }
    return found;
  }
});

describe.runIf(runnable)('a reflink copy on btrfs', () => {
  let mounted: Filesystem;
  beforeAll(async () => {
    mounted = await mountFilesystem(BTRFS);
  });
  afterAll(() => mounted.dispose());

  it('gets what it lacks, exit 0, without a guarantee', async () => {
    const { original, copy } = await halfShared(mounted.path, 'cow');
    const content = await sha256(original);
    const result = await allocate(copy);
    expect(result.guarantee).toBe(false);
    expect(result.warnings.join('\n')).toMatch(/copies on write/);
    expect(result.warnings.join('\n')).toMatch(/shared/);
    expect(await missing(copy, 'falloc')).toEqual([]);
    expect(await sha256(copy)).toBe(content);
    expect(await sha256(original)).toBe(content);
    expect((await cliJson(['verify', copy])).status).toBe(3);
  });

  // NOCOW promises nothing for a block that somebody else uses too: the next write moves it.
  it.each(['reflink', 'snapshot'] as const)('is without a guarantee with NOCOW too (%s)', async (how) => {
    const volume = `${mounted.path}/${how}`;
    await mustRun('btrfs', ['subvolume', 'create', volume]);
    const inVolume = { ...mounted, path: volume };
    const path = await emptyFile(inVolume, { ...BTRFS, nocow: true });
    await makePattern(path, segments);
    const content = await sha256(path);
    if (how === 'snapshot') {
      await mustRun('btrfs', ['subvolume', 'snapshot', volume, `${volume}-snapshot`]);
    } else {
      const other = await emptyFile(inVolume, { ...BTRFS, nocow: true }, 'other.raw');
      await mustRun('cp', ['--reflink=always', path, other]);
    }
    expect(await sharedBytes(path)).toBeGreaterThan(0);
    const result = await allocate(path);
    expect(result).toMatchObject({ guarantee: false });
    expect(result.warnings.join('\n')).toMatch(/shared/);
    expect(await missing(path, 'falloc')).toEqual([]);
    expect(await sha256(path)).toBe(content);
    expect((await stat(path)).size).toBe(16 * MiB + 100);
    const verdict = await cliJson<Verdict>(['verify', path]);
    expect(verdict.status).toBe(3);
    expect(verdict.document.missing.some(({ why }) => /shared/.test(why))).toBe(true);
  });
});
