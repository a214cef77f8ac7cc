import { statfs } from 'node:fs/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { Descriptor, READ_ONLY } from '../../lib/descriptor.js';
import { readSpace } from '../../lib/filesystem.js';
import type { AllocationResult } from '../../lib/types.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { hostBytes } from '../support/judges.js';
import { attachLoop } from '../support/loop.js';
import { makePattern, segmentsChecksum, type Segment } from '../support/patterns.js';
import { mustRun, run, spawnCli } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import {
  allocate,
  BTRFS,
  bytesOf,
  cliJson,
  emptyFile,
  EXT3,
  EXT4,
  expectJsonLines,
  expectOneLine,
  GiB,
  KiB,
  makeSparse,
  MiB,
  missing,
  MKFS_TOOLS,
  startAllocation,
  TMPFS,
  TOOLS,
  XFS,
  type JsonOutcome,
  type Level,
  type Refusal,
  type Storage,
} from './helpers.js';

const runnable = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, ...MKFS_TOOLS, 'btrfs', 'dd', 'df'],
});

const NOCOW: Storage = { ...BTRFS, name: 'btrfs with NOCOW', nocow: true };
const storages: Storage[] = [EXT4, XFS, BTRFS, NOCOW, EXT3, TMPFS];

async function available(path: string): Promise<number> {
  const { bavail, bsize } = await statfs(path);
  return bavail * bsize;
}

/** Data at the head, and `size` bytes in all. */
function headed(size: number): Segment[] {
  return [
    { kind: 'data', length: MiB },
    { kind: 'hole', length: size - MiB },
  ];
}

/** Takes all the space that is left, as root: what is kept for root too. */
async function fill(folder: string): Promise<void> {
  const { status } = await run('dd', ['if=/dev/zero', `of=${folder}/filler`, 'bs=1M', 'oflag=direct', 'status=none']);
  expect(status).not.toBe(0);
  await run('dd', ['if=/dev/zero', `of=${folder}/filler-2`, 'bs=4k', 'status=none', 'conv=fsync']);
}

async function removeFillers(folder: string): Promise<void> {
  await mustRun('rm', ['-f', `${folder}/filler`, `${folder}/filler-2`]);
  await mustRun('sync', ['-f', folder]);
}

function expectNoSpace(outcome: JsonOutcome<Refusal>, code: 'ENOSPC' | 'EDQUOT', path: string): void {
  expectOneLine(outcome, code);
  expectAmounts(outcome, code, path);
}

function expectAmounts(outcome: JsonOutcome<Refusal>, code: 'ENOSPC' | 'EDQUOT', path: string): void {
  expect(outcome.status, outcome.stderr).toBe(1);
  const { error } = outcome.document;
  expect(error).toMatchObject({ code, path });
  expect(error.needed).toBeGreaterThan(0);
  expect(error.available).toBeGreaterThanOrEqual(0);
}

describe.runIf(runnable)('too little space', () => {
  let mounted: Filesystem | undefined;
  afterEach(() => mounted?.dispose());

  for (const storage of storages) {
    for (const level of ['falloc', 'full'] as const) {
      it(`is told before the first write, with how much is missing (${storage.name}, ${level})`, async () => {
        mounted = await mountFilesystem(storage);
        const path = await emptyFile(mounted, storage);
        const segments = headed(2 * GiB);
        await makePattern(path, segments);
        const [blocks, free, data] = [
          await hostBytes(path),
          await available(mounted.path),
          await segmentsChecksum(path, segments),
        ];
        const outcome = await cliJson<Refusal>(['allocate', path, '--preallocation', level]);
        expectNoSpace(outcome, 'ENOSPC', path);
        const { needed, available: told, message } = outcome.document.error;
        expect(needed).toBeGreaterThanOrEqual(2 * GiB - MiB);
        expect(needed).toBeLessThan(1.01 * 2 * GiB);
        expect(Math.abs(told! - free)).toBeLessThan(MiB);
        expect(message).toContain(String(needed! - told!));
        expect(await hostBytes(path)).toBe(blocks);
        expect(await available(mounted.path)).toBe(free);
        expect(await segmentsChecksum(path, segments)).toBe(data);
        // A range that fits is no problem.
        expect(await allocate(path, '--length', '4M', '--preallocation', level)).toMatchObject({
          effective: { offset: 0, length: 4 * MiB },
        });
      });
    }
  }

  it('behind a loop device is told before the first write', async () => {
    mounted = await mountFilesystem(EXT4);
    const path = makeSparse(`${mounted.path}/disk.raw`, GiB);
    await using loop = await attachLoop({ file: path });
    const outcome = await cliJson<Refusal>(['allocate', loop.device]);
    expectNoSpace(outcome, 'ENOSPC', loop.device);
    expect(await hostBytes(path)).toBe(0);
  });

  it.each([EXT4, EXT3, XFS])('is not seen where the file just fits ($name)', async (storage) => {
    mounted = await mountFilesystem(storage);
    const size = (await available(mounted.path)) - 2 * MiB;
    const path = makeSparse(`${mounted.path}/disk.raw`, size - (size % MiB));
    expect(await allocate(path)).toMatchObject({ verified: true });
  });

  it('is not seen in what lies between the holes of a call, for which xfs wants room too', async () => {
    mounted = await mountFilesystem(XFS);
    const path = `${mounted.path}/disk.raw`;
    const pair: Segment[] = [
      { kind: 'data', length: 1792 * KiB },
      { kind: 'hole', length: 256 * KiB },
    ];
    await makePattern(path, Array.from({ length: 64 }, () => pair).flat());
    const filler = (await available(mounted.path)) - 32 * MiB;
    await mustRun('fallocate', ['-l', String(filler), `${mounted.path}/filler`]);
    expect(await allocate(path)).toMatchObject({ allocated: 16 * MiB, verified: true });
  });
});

describe.runIf(runnable)('space to keep free', () => {
  let mounted: Filesystem | undefined;
  afterEach(() => mounted?.dispose());

  for (const storage of storages) {
    for (const level of ['falloc', 'full'] as const) {
      it(`is kept, and what was done is told (${storage.name}, ${level})`, async () => {
        mounted = await mountFilesystem(storage);
        const path = await emptyFile(mounted, storage);
        const size = Math.floor(((await available(mounted.path)) * 0.97) / MiB) * MiB;
        const segments = headed(size);
        await makePattern(path, segments);
        const data = await segmentsChecksum(path, segments);
        const args = ['allocate', path, '--preallocation', level, '--keep-free', '10%'];
        const outcome = await cliJson<Refusal>(args);
        expect(outcome.status, outcome.stderr).toBe(1);
        expectOneLine(outcome, 'KEEP_FREE');
        const { error, done, target } = outcome.document;
        expect(target).toBe(path);
        expect(error).toMatchObject({ code: 'KEEP_FREE', path });
        expect(done).toMatchObject({ requested: { offset: 0, length: size } });
        expect(done!.allocated).toBeGreaterThan(size / 2);
        await mustRun('sync', ['-f', mounted.path]);
        const { blocks, bsize } = await statfs(mounted.path);
        // Records of extents come out of the same space: a block or two more than the data.
        expect(await available(mounted.path)).toBeGreaterThan(blocks * bsize * 0.1 - MiB);
        expect(await available(mounted.path)).toBeLessThan(blocks * bsize * 0.1 + 32 * MiB);
        expect(await segmentsChecksum(path, segments)).toBe(data);
        // A second try may use up what the first had left for what was in flight.
        expect((await cliJson<Refusal>(args)).document.error.code).toBe('KEEP_FREE');
        await mustRun('sync', ['-f', mounted.path]);
        expect(await available(mounted.path)).toBeGreaterThan(blocks * bsize * 0.1 - MiB);
      });
    }
  }

  it('that is not there any more stops a run before its first write', async () => {
    mounted = await mountFilesystem(EXT4);
    const path = makeSparse(`${mounted.path}/disk.raw`, 4 * MiB);
    const outcome = await cliJson<Refusal>(['allocate', path, '--keep-free', '100%']);
    expect(outcome.status).toBe(1);
    expectOneLine(outcome, 'KEEP_FREE');
    expect(await hostBytes(path)).toBe(0);
    expect((await cliJson<Refusal>(['allocate', path, '--keep-free', '1P'])).document.error.code).toBe('KEEP_FREE');
    expect(await allocate(path, '--keep-free', '8M')).toMatchObject({ verified: true });
  });
});

interface Full {
  level: Level;
  folder: string;
  storage: Storage;
}

/** A run during which somebody else takes the rest of the space. */
async function filledMeanwhile({ level, folder, storage }: Full, code: 'ENOSPC' | 'EDQUOT'): Promise<void> {
  const path = await emptyFile({ path: folder } as Filesystem, storage);
  const segments = headed(64 * MiB);
  await makePattern(path, segments);
  const data = await segmentsChecksum(path, segments);
  const args = ['allocate', path, '--preallocation', level, '--speed', '16M', '--json', '--progress', 'json'];
  await using spawned = await startAllocation(spawnCli(args));
  await fill(folder);
  const outcome = await spawned.exit;
  const document = JSON.parse(outcome.stdout) as Refusal;
  expectAmounts({ ...outcome, document }, code, path);
  expectJsonLines(outcome.stderr, { error: { code } });
  expect(document.done!.allocated).toBeGreaterThan(0);
  expect(document.done!.allocated).toBeLessThan(63 * MiB);
  expect(await segmentsChecksum(path, segments)).toBe(data);
  await removeFillers(folder);
  const result: AllocationResult = await allocate(path, '--preallocation', level);
  expect(result.verified).toBe(true);
  expect(bytesOf(await missing(path, level))).toBe(0);
  expect(await segmentsChecksum(path, segments)).toBe(data);
}

describe.runIf(runnable)('space that somebody else takes meanwhile', () => {
  const inUse: [Storage, Level][] = [
    [EXT4, 'falloc'],
    [EXT4, 'full'],
    [XFS, 'falloc'],
    [XFS, 'full'],
    [BTRFS, 'falloc'],
    [NOCOW, 'full'],
    [EXT3, 'full'],
    [TMPFS, 'full'],
  ];
  it.each(inUse.map(([storage, level]) => ({ name: storage.name, storage, level })))(
    'ends the run in ENOSPC, the data intact, and the next run completes ($name, $level)',
    async ({ storage, level }) => {
      await using mounted = await mountFilesystem(storage);
      await filledMeanwhile({ level, folder: mounted.path, storage }, 'ENOSPC');
    },
  );
});

describe.runIf(runnable)('a run that writes, without a limit,', () => {
  it.each([EXT4, XFS])('has reserved all that it writes before the first write ($name)', async (storage) => {
    await using mounted = await mountFilesystem({ ...storage, size: GiB });
    const path = await emptyFile(mounted, storage);
    const segments = headed(640 * MiB);
    await makePattern(path, segments);
    const data = await segmentsChecksum(path, segments);
    const args = ['allocate', path, '--preallocation', 'full', '--json', '--progress', 'json'];
    await using spawned = await startAllocation(spawnCli(args));
    // Nothing may open the file now: that waits for who is stopped to give its lease back.
    spawned.kill('SIGSTOP');
    expect(await hostBytes(path)).toBeGreaterThanOrEqual(640 * MiB);
    await fill(mounted.path);
    spawned.kill('SIGCONT');
    const { status, stdout, stderr } = await spawned.exit;
    expect(status, stderr).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ verified: true, guarantee: true });
    expect(bytesOf(await missing(path, 'full'))).toBe(0);
    expect(await segmentsChecksum(path, segments)).toBe(data);
  });
});

describe.runIf(runnable)('free space while others write', () => {
  it('is never taken for that of a quota', async () => {
    await using mounted = await mountFilesystem(EXT4);
    await using file = await Descriptor.open(makeSparse(`${mounted.path}/disk.raw`, MiB), READ_ONLY);
    const writer = mustRun('dd', ['if=/dev/zero', `of=${mounted.path}/other`, 'bs=64k', 'count=1000', 'status=none']);
    let writing = true;
    const written = writer.then(() => (writing = false));
    let readings = 0;
    for (; writing; readings++) {
      expect(await readSpace(file, 'ext4')).toMatchObject({ quota: false });
    }
    await written;
    expect(readings).toBeGreaterThan(10);
  });
});

describe.runIf(runnable)('a quota', () => {
  async function limited(mounted: Filesystem, limit: string): Promise<string> {
    const volume = `${mounted.path}/volume`;
    await mustRun('btrfs', ['quota', 'enable', mounted.path]);
    await mustRun('btrfs', ['subvolume', 'create', volume]);
    await mustRun('btrfs', ['quota', 'rescan', '-w', mounted.path]);
    await mustRun('btrfs', ['qgroup', 'limit', limit, volume]);
    return volume;
  }

  it.each(['falloc', 'full'] as const)('of btrfs is told before the first write (%s)', async (level) => {
    await using mounted = await mountFilesystem(BTRFS);
    const volume = await limited(mounted, '32M');
    const path = makeSparse(`${volume}/disk.raw`, 64 * MiB);
    const outcome = await cliJson<Refusal>(['allocate', path, '--preallocation', level]);
    expectNoSpace(outcome, 'EDQUOT', path);
    expect(outcome.document.error.needed).toBeGreaterThanOrEqual(64 * MiB);
    expect(outcome.document.error.available).toBeLessThanOrEqual(32 * MiB);
    expect(await hostBytes(path)).toBe(0);
    expect((await allocate(path, '--length', '8M', '--preallocation', level)).verified).toBe(true);
  });

  it.each(['falloc', 'full'] as const)('of btrfs that is used up meanwhile ends in EDQUOT (%s)', async (level) => {
    await using mounted = await mountFilesystem(BTRFS);
    const volume = await limited(mounted, '96M');
    await filledMeanwhile({ level, folder: volume, storage: NOCOW }, 'EDQUOT');
  });

  const projects = [
    { ...XFS, mountOptions: ['prjquota'] },
    { ...EXT4, mountOptions: ['prjquota'], mkfsArgs: ['-O', 'quota,project', '-E', 'quotatype=prjquota', '-b', '4096'] },
  ];
  it.each(projects)('of a project on $name is told before the first write', async (storage) => {
    await using mounted = await mountIfQuota(storage);
    if (!mounted) return;
    const folder = `${mounted.path}/project`;
    await mustRun('mkdir', [folder]);
    for (const command of [`project -s -p ${folder} 42`, 'limit -p bhard=16m 42']) {
      await mustRun('xfs_quota', ['-f', '-x', '-c', command, mounted.path]);
    }
    const path = makeSparse(`${folder}/disk.raw`, 48 * MiB);
    const outcome = await cliJson<Refusal>(['allocate', path]);
    expect(outcome.status, outcome.stderr).toBe(1);
    expect(outcome.document.error.code).toMatch(/^(EDQUOT|ENOSPC)$/);
    expect(outcome.document.error.needed).toBeGreaterThanOrEqual(48 * MiB);
    expect(outcome.document.error.available).toBeLessThanOrEqual(16 * MiB);
    expect(await hostBytes(path)).toBeLessThan(64 * KiB);
    expect((await allocate(path, '--length', '8M')).verified).toBe(true);
  });

  /** null where the kernel has no project quotas. */
  async function mountIfQuota(storage: Storage): Promise<Filesystem | null> {
    return mountFilesystem(storage).catch((error: unknown) => {
      process.stderr.write(`SKIPPED: no project quotas on ${storage.type} here: ${String(error)}\n`);
      return null;
    });
  }
});
