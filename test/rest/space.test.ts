/** Space for what is copied from below, for its tables, and for what is given storage after it. */
import { closeSync, openSync, readSync, statfsSync, statSync, writeSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { open, ThickenError } from '../../lib/index.js';
import type { AllocationRequest } from '../../lib/types.js';
import { KiB, MiB, soak } from '../storage/helpers.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { random } from '../support/patterns.js';
import { mustRun, run } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ root: true, loop: true, tools: ['mkfs.ext4', 'fallocate', 'sync'] });
const firstSeed = Number(process.env.THICKEN_SEED ?? 1);
const SIZE = 96 * MiB;
const FILESYSTEM = { type: 'ext4', size: 512 * MiB } as const;

/** Data, and holes, in lumps of a size. */
async function makeBase(data: number, hole: number): Promise<string> {
  const path = scratchPath('base.raw');
  await mustRun('qemu-img', ['create', '-q', '-f', 'raw', path, String(SIZE)]);
  const writes = [];
  for (let at = 0; at < SIZE; at += data + hole) writes.push(`write -q -P 5 ${at} ${Math.min(data, SIZE - at)}`);
  await qemuIo(path, 'raw', ...writes);
  return path;
}

interface Case {
  name: string;
  /** Bytes of data and of the hole after it, over and over. */
  base: [data: number, hole: number];
  options?: string[];
  request?: AllocationRequest;
  /** What has become of the image before. */
  age?: (image: string) => Promise<void>;
  /** What more may be asked for: QEMU passes over the rest of free clusters that are too few for a request. */
  spare?: number;
}

/** Data clusters that nothing refers to any more: the entries of the only L2 table go, not their counts. */
async function leak(image: string): Promise<void> {
  await qemuIo(image, 'qcow2', 'write -q -P 3 0 40M');
  const fd = openSync(image, 'r+');
  const at = (offset: number) => {
    const bytes = Buffer.alloc(8);
    readSync(fd, bytes, 0, 8, offset);
    return Number(bytes.readBigUInt64BE() & 0x00fffffffffffe00n);
  };
  writeSync(fd, Buffer.alloc((40 * MiB) / (64 * KiB) * 8), 0, 5120, at(at(40)));
  closeSync(fd);
}

/** The clusters of a snapshot are free holes in the file. */
async function holesInside(image: string): Promise<void> {
  await qemuIo(image, 'qcow2', 'write -q -P 3 0 40M');
  await mustRun('qemu-img', ['snapshot', '-c', 'then', image]);
  await qemuIo(image, 'qcow2', 'write -q -P 4 0 40M');
  await mustRun('qemu-img', ['snapshot', '-d', 'then', image]);
}

/** They have blocks, too. */
async function freeInside(image: string): Promise<void> {
  await holesInside(image);
  await mustRun('fallocate', ['--keep-size', '--length', '82M', image]);
}

/** There are blocks only behind the file's end. */
async function reservedBehind(image: string): Promise<void> {
  await holesInside(image);
  await mustRun('fallocate', ['--keep-size', '--offset', '80M', '--length', '60M', image]);
}

async function moving(image: string): Promise<void> {
  await qemuIo(image, 'qcow2', 'write -q -P 3 0 20M', 'write -q -c -P 4 40M 10M');
  await mustRun('qemu-img', ['snapshot', '-c', 'then', image]);
}

async function written(image: string): Promise<void> {
  await qemuIo(image, 'qcow2', 'write -q -P 3 0 20M');
}

const CASES: Case[] = [
  { name: 'all of it', base: [SIZE, 0] },
  { name: 'written', base: [SIZE, 0], request: { preallocation: 'full' } },
  { name: 'bits, each of which takes a cluster', base: [4 * KiB, MiB - 4 * KiB], options: ['cluster_size=1M'], request: { preallocation: 'metadata' } },
  { name: 'what has zeros that the format can’t tell', base: [8 * MiB, 8 * MiB], options: ['compat=0.10'], request: { preallocation: 'metadata' } },
  { name: 'what has zeros', base: [8 * MiB, 8 * MiB], request: { preallocation: 'metadata' } },
  { name: 'zeros and data, with host blocks', base: [8 * MiB, 8 * MiB] },
  { name: 'small clusters', base: [48 * MiB, 48 * MiB], options: ['cluster_size=512'], request: { preallocation: 'metadata' } },
  { name: 'only what is below', base: [SIZE, 0], request: { route: 'populate', length: 24 * MiB }, age: leak },
  { name: 'beside leaks', base: [SIZE, 0], age: leak },
  { name: 'in free clusters of the file', base: [SIZE, 0], age: freeInside, spare: 4 * MiB },
  { name: 'in free clusters of the file, tables only', base: [SIZE, 0], age: freeInside, request: { preallocation: 'metadata' }, spare: 4 * MiB },
  { name: 'in parts of clusters', base: [32 * KiB, 32 * KiB], options: ['extended_l2=on', 'cluster_size=128k'] },
  { name: 'in another file, tables only', base: [8 * MiB, 8 * MiB], options: ['data_file=data.raw'], request: { preallocation: 'metadata' } },
  { name: 'in another file', base: [SIZE, 0], options: ['data_file=data.raw'], age: written },
  { name: 'in holes of the file', base: [SIZE, 0], age: reservedBehind },
  { name: 'in holes of the file, tables only', base: [SIZE, 0], age: reservedBehind, request: { preallocation: 'metadata' } },
  { name: 'with a reserve', base: [SIZE, 0], age: moving },
  { name: 'with a reserve, beside holes', base: [SIZE, 0], age: async (image) => (await holesInside(image), moving(image)) },
  { name: 'with a reserve, beside leaks', base: [SIZE, 0], age: async (image) => (await leak(image), moving(image)) },
  { name: 'with a reserve, beside zeros', base: [8 * MiB, 8 * MiB], age: moving, request: { preallocation: 'full' } },
];

const freeOf = ({ path }: Filesystem): number => {
  const { bavail, bsize } = statfsSync(path);
  return bavail * bsize;
};

/** Leaves so much free. */
async function leave(filesystem: Filesystem, bytes: number): Promise<void> {
  const filler = `${filesystem.path}/filler`;
  await mustRun('rm', ['-f', filler]);
  await mustRun('sync', ['-f', filesystem.path]);
  const length = freeOf(filesystem) - Math.floor(bytes);
  await mustRun('fallocate', ['-l', String(length), filler]);
}

async function makeImage(folder: string, base: string, { options = [], age }: Case): Promise<string> {
  const path = `${folder}/image.qcow2`;
  const words = options.map((option) => option.replace('=data.raw', `=${folder}/data.raw`)).flatMap((option) => ['-o', option]);
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', ...words, path]);
  await age?.(path);
  return path;
}

async function allocate(path: string, request: AllocationRequest = {}) {
  await using image = await open(path, { format: 'qcow2' });
  return await image.allocate(request).result;
}

/** Bytes that a run takes where there is room. */
async function taken(base: string, given: Case): Promise<number> {
  await using filesystem = await mountFilesystem(FILESYSTEM);
  const path = await makeImage(filesystem.path, base, given);
  await mustRun('sync', ['-f', filesystem.path]);
  const before = freeOf(filesystem);
  expect((await allocate(path, given.request)).verified).toBe(true);
  await mustRun('sync', ['-f', filesystem.path]);
  return before - freeOf(filesystem);
}

describe.runIf(runnable)('the space for an image over another', () => {
  it.each(CASES)('is compared before the first write: $name', { timeout: 120_000 }, async (given) => {
    const base = await makeBase(...given.base);
    const bytes = await taken(base, given);
    await using filesystem = await mountFilesystem(FILESYSTEM);
    const path = await makeImage(filesystem.path, base, given);
    await leave(filesystem, bytes * 0.97 - 256 * KiB);
    const before = await facts(path);
    const refused = await allocate(path, given.request).catch((error: unknown) => error);
    expect(refused).toMatchObject({ code: 'ENOSPC', path: expect.stringContaining(filesystem.path), needed: expect.any(Number), available: expect.any(Number) });
    expect(await facts(path)).toEqual(before);
    // A few percent, and a file system's own records; and what is said to be needed is enough.
    const { needed } = refused as { needed: number };
    expect(needed).toBeLessThan(bytes * 1.03 + MiB + (given.spare ?? 0));
    await leave(filesystem, needed + 64 * KiB);
    expect((await allocate(path, given.request)).verified).toBe(true);
    await mustRun('qemu-img', ['check', '-f', 'qcow2', path]);
  });
});

/** What images go through, by a seed: writes, snapshots and their end, discards, and blocks that are reserved. */
function anyCase(seed: number): Case {
  const next = random(seed);
  const pick = <T>(...all: T[]): T => all[next() % all.length]!;
  const version2 = next() % 5 === 0;
  const format = version2 ? 'compat=0.10' : pick('refcount_bits=16', 'refcount_bits=64', 'extended_l2=on');
  const sizes = format === 'extended_l2=on' ? ['16k', '64k', '256k'] : ['4k', '16k', '64k', '256k', '2M'];
  const options = [`cluster_size=${pick(...sizes)}`, format];
  const offset = pick(0, next() % 40) * MiB;
  const length = offset === 0 ? SIZE : (1 + (next() % 50)) * MiB;
  const request = { preallocation: pick('metadata', 'falloc', 'full'), offset, length } as const;
  const steps = Array.from({ length: next() % 7 }, (_, i) => stepOf(next() % 6, next() % 90, 1 + (next() % 6), i));
  const age = async (image: string) => {
    for (const step of steps) await step(image);
  };
  const base: Case['base'] = [pick(SIZE, 64 * KiB, 8 * MiB, 300 * KiB), pick(0, 64 * KiB, 8 * MiB, 100 * KiB)];
  return { name: `seed ${seed}`, base, options, request, age };
}

function stepOf(kind: number, at: number, length: number, i: number): (image: string) => Promise<unknown> {
  const steps = [
    (image: string) => qemuIo(image, 'qcow2', `write -q -P 3 ${at}M ${length}M`),
    (image: string) => qemuIo(image, 'qcow2', `discard ${at}M ${length}M`),
    // Not where there are clusters already.
    (image: string) => run('qemu-io', ['-f', 'qcow2', '-c', `write -q -c -P 4 ${at}M ${length}M`, image]),
    (image: string) => mustRun('qemu-img', ['snapshot', '-c', `s${i}`, image]),
    // The one before, if there is one.
    (image: string) => run('qemu-img', ['snapshot', '-d', `s${i - 1}`, image]),
    (image: string) => mustRun('fallocate', ['--keep-size', '-o', `${at}M`, '-l', `${length * 8}M`, image]),
  ];
  return steps[kind]!;
}

describe.runIf(runnable)('what is said to be needed', () => {
  const cases = Array.from({ length: soak ? 100 : 8 }, (_, i) => anyCase(firstSeed + i));

  it.each(cases)('is enough, whatever the image went through: $name', { timeout: 120_000 }, async (given) => {
    const base = await makeBase(...given.base);
    await using filesystem = await mountFilesystem(FILESYSTEM);
    const path = await makeImage(filesystem.path, base, given);
    await leave(filesystem, 64 * KiB);
    const refused = await allocate(path, given.request).catch((error: unknown) => error);
    // Its blocks may be there already.
    if (!(refused instanceof ThickenError)) return;
    expect(refused).toMatchObject({ code: 'ENOSPC', needed: expect.any(Number), done: { allocated: 0 } });
    await leave(filesystem, refused.needed! + 64 * KiB);
    expect((await allocate(path, given.request)).verified).toBe(true);
  });
});

describe.runIf(runnable)('the space for tables', () => {
  it('is compared before the first write where the data has a file system of its own', async () => {
    const base = await makeBase(8 * MiB, 8 * MiB);
    await using own = await mountFilesystem(FILESYSTEM);
    await using other = await mountFilesystem(FILESYSTEM);
    const options = ['cluster_size=512', `data_file=${other.path}/data.raw`];
    const path = await makeImage(own.path, base, { name: '', base: [0, 0], options });
    await leave(own, MiB);
    const before = [await facts(path), await facts(`${other.path}/data.raw`)];
    await expect(allocate(path)).rejects.toMatchObject({ code: 'ENOSPC', path });
    expect([await facts(path), await facts(`${other.path}/data.raw`)]).toEqual(before);
    await leave(own, 4 * MiB);
    expect((await allocate(path)).verified).toBe(true);
  });
});

async function facts(path: string): Promise<unknown> {
  const { size, blocks, mtimeMs } = statSync(path);
  return { size, blocks, mtimeMs, sum: await mustRun('sha256sum', [path]) };
}
