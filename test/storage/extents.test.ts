import { closeSync, openSync, readFileSync, readSync, writeFileSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import fc from 'fast-check';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { makePattern, type Segment } from '../support/patterns.js';
import { cliMain, mustRun, run } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { BTRFS, EXT3, EXT4, KiB, makeSparse, MiB, MKFS_TOOLS, soak, TOOLS, XFS, type Storage } from './helpers.js';
import { libraryStretches, states, within } from './stretches.js';

const runnable = requires({ root: true, loop: true, tools: [...TOOLS, ...MKFS_TOOLS, 'strace'] });
const seed = Number(process.env.THICKEN_SEED ?? 40_961);

const EXT4_SMALL: Storage = { ...EXT4, name: 'ext4 with blocks of 1 KiB', mkfsArgs: ['-b', '1024'] };
const EXT4_BIGALLOC: Storage = { ...EXT4, name: 'ext4 with clusters of 64 KiB', mkfsArgs: ['-O', 'bigalloc', '-C', '65536'] };
const XFS_SMALL: Storage = { ...XFS, name: 'xfs with blocks of 1 KiB', mkfsArgs: ['-b', 'size=1024'] };

/** Blocks that are neither in order nor settled: what a scan meets beside a guest. */
const UNIT = 4 * KiB;
const UNITS = 512;

interface Operation {
  name: string;
  at: number;
  count: number;
}

const operation: fc.Arbitrary<Operation> = fc.record({
  name: fc.constantFrom('pwrite', 'pwrite', 'falloc -k', 'fpunch', 'fzero -k', 'fcollapse', 'finsert', 'reflink', 'sync'),
  at: fc.integer({ min: 0, max: UNITS - 1 }),
  count: fc.integer({ min: 1, max: 32 }),
});

function command({ name, at, count }: Operation, path: string): string {
  const range = `${at * UNIT} ${count * UNIT}`;
  if (name === 'sync') return 'fsync';
  // From the other half of the file, where it is written.
  return name === 'reflink' ? `reflink ${path} ${((at + UNITS / 2) % UNITS) * UNIT} ${range}` : `${name} ${range}`;
}

/** Those that a file system lacks, or that end behind the file, change nothing. */
async function perform(path: string, operations: readonly Operation[]): Promise<void> {
  await run('xfs_io', ['-f', path], { input: operations.map((each) => `${command(each, path)}\n`).join('') });
}

/** The kernel forgets the extents of files that nobody has open. */
async function forgetExtents(): Promise<void> {
  await mustRun('sync', []);
  writeFileSync('/proc/sys/vm/drop_caches', '3');
}

function readAt(path: string, offset: number): void {
  const descriptor = openSync(path, 'r');
  try {
    readSync(descriptor, Buffer.alloc(1), 0, 1, offset);
  } finally {
    closeSync(descriptor);
  }
}

describe.runIf(runnable).each([EXT4, EXT4_SMALL, EXT4_BIGALLOC, EXT3, XFS, XFS_SMALL, BTRFS])(
  'the extents of a file on $name',
  (storage) => {
    let mounted: Filesystem;
    beforeAll(async () => {
      mounted = await mountFilesystem(storage);
    });
    afterAll(() => mounted.dispose());

    it('are those of FIEMAP, whatever was done to the file and not yet written', async () => {
      const lengths = { minLength: 1, maxLength: 40 };
      const property = fc.asyncProperty(fc.array(operation, lengths), fc.nat(), async (operations, pick) => {
        const path = `${mounted.path}/disk.raw`;
        await mustRun('rm', ['-f', path]);
        await mustRun('truncate', ['-s', String(UNITS * UNIT - 100), path]);
        await perform(path, operations);
        const found = await libraryStretches(path);
        const expected = await states(path);
        expect(found).toEqual(expected);
        const { size } = await stat(path);
        const offset = pick % size;
        const range = { offset, length: 1 + ((pick * 7) % (size - offset)) };
        expect(await libraryStretches(path, range)).toEqual(within(expected, range));
      });
      await fc.assert(property, { seed, numRuns: soak ? 300 : 20, endOnFailure: !soak });
    });

    it('are those of FIEMAP where the kernel has only some of them in memory', async () => {
      const path = `${mounted.path}/many.raw`;
      const pair: Segment[] = [
        { kind: 'data', length: 4 * KiB },
        { kind: 'hole', length: 4 * KiB },
      ];
      await makePattern(path, Array.from({ length: 4000 }, () => pair).flat());
      const { size } = await stat(path);
      const all = { offset: 0, length: size };
      await forgetExtents();
      const cold = await libraryStretches(path);
      for (const reads of [[0.5], [0.1, 0.3, 0.9], [0, 0.2, 0.4, 0.6, 0.8]]) {
        await forgetExtents();
        for (const at of reads) readAt(path, Math.floor(at * size));
        const part = { offset: Math.floor(size / 3), length: Math.floor(size / 2) };
        expect(await libraryStretches(path, part)).toEqual(within(cold, part));
        expect(await libraryStretches(path, all)).toEqual(cold);
      }
      expect(cold).toEqual(await states(path));
    });
  },
);

describe.runIf(runnable).each([
  { ...EXT4, call: '0x66, 0x2a' },
  { ...XFS, call: '0x58, 0x38' },
])('a scan on $name', ({ call, ...storage }) => {
  it('asks the file system itself, and FIEMAP for what is not in memory', async () => {
    await using mounted = await mountFilesystem(storage);
    const path = `${mounted.path}/disk.raw`;
    await makePattern(path, [{ kind: 'data', length: MiB }, { kind: 'hole', length: MiB }]);
    await states(path);
    const log = scratchPath('strace');
    await mustRun('strace', ['-f', '-e', 'trace=ioctl', '-o', log, process.execPath, cliMain, 'map', '--json', path]);
    const calls = readFileSync(log, 'utf8');
    expect(calls).toContain(call);
    expect(calls.split('FS_IOC_FIEMAP').length - 1).toBeLessThan(5);
  });
});

describe.runIf(runnable).each([
  { type: 'ext4', room: 30, mkfs: ['mkfs.ext4', '-q', '-F', '-E', 'lazy_itable_init=1,nodiscard'] },
  { type: 'xfs', room: 90, mkfs: ['mkfs.xfs', '-q', '-f', '-K'] },
])('a scan on $type of a file whose data the storage below refused', ({ type, room, mkfs }) => {
  it('tells the error: a sync is told of it once', async () => {
    await using below = await mountFilesystem({ type: 'tmpfs', size: room * MiB });
    const image = makeSparse(`${below.path}/image`, 400 * MiB);
    await mustRun(mkfs[0]!, [...mkfs.slice(1), image]);
    const folder = scratchPath('mnt');
    await mustRun('mkdir', [folder]);
    await mustRun('mount', ['-t', type, '-o', 'loop', image, folder]);
    try {
      const path = `${folder}/disk.raw`;
      await mustRun('xfs_io', ['-f', '-c', 'truncate 64m', '-c', 'pwrite 0 48m', path]);
      const { status, stderr } = await run(process.execPath, [cliMain, 'map', '--json', path]);
      expect(status).not.toBe(0);
      expect(stderr).toMatch(/ENOSPC|EIO/);
    } finally {
      await mustRun('umount', [folder]);
    }
  });
});
