import { statfsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { open } from '../../lib/index.js';
import { allCases, create, make, sizeOf, type Case } from '../native/qcow2-cases.js';
import { check, CLEAN, GiB, KiB, MiB, qemuIo } from '../native/qcow2-tool.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { allocate, hostBytes, TOOLS, verify } from './helpers.js';

const mountable = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4', 'mkfs.xfs', 'fallocate'] });
const seed = Number(process.env.THICKEN_SEED ?? 4711);
const base = { clusterSize: 64 * KiB, version: 3, refcountBits: 16, extended: false } as const;

function freeOf({ path }: Filesystem): number {
  const { bavail, bsize } = statfsSync(path);
  return bavail * bsize;
}

/** Leaves so much free. */
async function fill(filesystem: Filesystem, leave: number, name = 'filler'): Promise<void> {
  const length = freeOf(filesystem) - leave;
  if (length > 0) await mustRun('fallocate', ['-l', String(length), `${filesystem.path}/${name}`]);
}

describe.runIf(mountable)('after allocation QEMU can rewrite the whole disk on a full file system', () => {
  const wanted: Partial<Case>[] = [
    { clusterSize: 64 * KiB, version: 3, refcountBits: 16, extended: false, snapshots: 2, fill: 'compressed' },
    { clusterSize: 4 * KiB, version: 3, refcountBits: 8, extended: false, snapshots: 2, fill: 'random' },
    { clusterSize: 64 * KiB, version: 3, refcountBits: 16, extended: true, snapshots: 0, fill: 'discards' },
    { clusterSize: 2048 * KiB, version: 2, refcountBits: 16, extended: false, snapshots: 2, fill: 'zeros' },
  ];
  const cases = wanted.map((one) =>
    allCases().find((given) => Object.entries(one).every(([key, value]) => given[key as keyof Case] === value))!,
  );

  it.each(cases)('$name', { timeout: 120_000 }, async (one) => {
    await using filesystem = await mountFilesystem({ type: cases.indexOf(one) % 2 ? 'xfs' : 'ext4', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    await make(file, one, seed);
    const result = await allocate(file);
    expect(result.guarantee).toBe(true);
    const before = hostBytes(file);
    // The file system keeps nothing for anybody else.
    for (let piece = 256 * MiB, i = 0; piece >= 4 * KiB; i++) {
      if (freeOf(filesystem) > piece && i < 4) {
        await mustRun('sh', ['-c', `fallocate -l ${piece} ${filesystem.path}/filler-${piece}-${i} || true`]);
      } else [piece, i] = [piece / 2, -1];
    }
    const size = sizeOf(one);
    const writes = Array.from({ length: Math.ceil(size / MiB) }, (_, i) => {
      return `write -P ${1 + (i % 200)} ${i * MiB} ${Math.min(MiB, size - i * MiB)}`;
    });
    await qemuIo(file, [...writes, 'flush'], ['-f', 'qcow2', '-t', 'none']);
    expect(hostBytes(file)).toBeLessThanOrEqual(before * 1.005);
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
  });
});

describe.runIf(mountable)('too little space', () => {
  it.each(['ext4', 'xfs'] as const)('is found out before the first write on %s', async (type) => {
    await using filesystem = await mountFilesystem({ type, size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 300 * MiB);
    await qemuIo(file, ['write -P 7 10M 3M']);
    await fill(filesystem, 200 * MiB);
    const before = hostBytes(file);
    const refused = await allocate(file).catch((error: unknown) => error);
    expect(refused).toMatchObject({ code: 'ENOSPC', path: file });
    const { needed, available } = refused as { needed: number; available: number };
    expect(needed).toBeGreaterThan(290 * MiB);
    expect(needed).toBeLessThan(310 * MiB);
    expect(available).toBeLessThan(210 * MiB);
    expect(hostBytes(file)).toBe(before);
    // A part that fits is allocated, and metadata takes no space for data.
    expect((await allocate(file, { length: 100 * MiB })).verified).toBe(true);
    expect((await allocate(file, { preallocation: 'metadata' })).verified).toBe(true);
    expect(await check(file)).toEqual(CLEAN);
  });

  it('is no matter where the file holds the blocks already, past its end too', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 300 * MiB);
    await mustRun('fallocate', ['--keep-size', '-l', String(305 * MiB), file]);
    await fill(filesystem, 8 * MiB);
    const result = await allocate(file);
    expect(result.guarantee).toBe(true);
    expect((await verify(file)).satisfied).toBe(true);
    expect(await check(file)).toEqual(CLEAN);
  });

  it('that comes while it runs leaves a sound image, and the next run goes on', { timeout: 120_000 }, async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 300 * MiB);
    await qemuIo(file, ['write -P 7 10M 3M']);
    await using image = await open(file);
    // Small chunks, so that it is at work for a while.
    const job = image.allocate({ speed: 100 * MiB });
    await new Promise((resolve) => job.once('progress', resolve));
    await fill(filesystem, 0);
    const error = await job.result.catch((caught: unknown) => caught);
    expect(error).toMatchObject({ code: 'ENOSPC', done: { requested: { offset: 0 } } });
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
    await qemuIo(file, ['read -P 7 10M 3M']);
    await mustRun('rm', [`${filesystem.path}/filler`]);
    expect((await image.allocate().result).verified).toBe(true);
    expect(await check(file)).toEqual(CLEAN);
  });

  it.each(['falloc', 'full'] as const)('to keep free is kept at %s', { timeout: 120_000 }, async (preallocation) => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 300 * MiB);
    const keepFree = freeOf(filesystem) - 120 * MiB;
    await using image = await open(file);
    await expect(image.allocate({ preallocation, keepFree }).result).rejects.toMatchObject({ code: 'KEEP_FREE' });
    expect(freeOf(filesystem)).toBeGreaterThanOrEqual(keepFree - MiB);
    expect(freeOf(filesystem)).toBeLessThan(keepFree + 64 * MiB);
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
    expect((await image.allocate().result).verified).toBe(true);
    expect(await check(file)).toEqual(CLEAN);
    await qemuIo(file, ['read -P 0 0 300M']);
  });
});
