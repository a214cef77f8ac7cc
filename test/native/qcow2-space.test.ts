import { copyFileSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { mountFilesystem } from '../support/filesystems.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { allCases, create, make, sizeOf, type Case } from './qcow2-cases.js';
import { buildTool, check, CLEAN, GiB, KiB, MiB, must, qemuImg, qemuIo, soak } from './qcow2-tool.js';

const tools = ['cmake', 'g++', 'qemu-img', 'qemu-io', 'flock', 'fallocate'];
const able = requires({ tools });
const mountable = requires({ root: true, loop: true, tools: [...tools, 'mkfs.ext4', 'mkfs.xfs'] });
const seed = Number(process.env.THICKEN_SEED ?? 4711);
const base = { version: 3, refcountBits: 16, extended: false, snapshots: 0, name: '' } as const;

let tool: string;

beforeAll(async () => {
  if (able) tool = await buildTool('sanitized');
}, 600_000);

const hostBytes = (file: string): number => statSync(file).blocks * 512;

describe.runIf(able)('what full allocation needs', () => {
  const measured = allCases().filter(({ snapshots, fill }) => snapshots === 0 && (fill === 'random' || fill === 'empty'));
  const cases = soak ? measured : measured.filter((_, i) => i % 7 === 0);

  it.each(cases)('is what qemu-img measure says: $name', async (one) => {
    const file = scratchPath('image.qcow2');
    await make(file, one, seed);
    const options = [`cluster_size=${one.clusterSize}`, `compat=${one.version === 2 ? '0.10' : '1.1'}`];
    if (one.version === 3) options.push(`refcount_bits=${one.refcountBits}`);
    if (one.extended) options.push('extended_l2=on');
    const measure = await qemuImg('measure', '--output=json', '-O', 'qcow2', '-o', options.join(), file);
    const { 'fully-allocated': expected } = JSON.parse(measure) as { 'fully-allocated': number };
    const { needed } = await must(tool, 'allocate', file, { level: 'metadata' });
    const clusters = needed.counted + needed.data + needed.tables + needed.refcounts - needed.freed;
    // QEMU counts the clusters of tables; the refcount table that was outgrown leaves a gap.
    const gap = needed.freed > 0 ? needed.freed + 2 : 0;
    expect(Math.abs(clusters * one.clusterSize - expected)).toBeLessThanOrEqual(gap * one.clusterSize);
    expect(needed.fileEnd).toBe(statSync(file).size);
    await mustRun('rm', [file]);
  });
});

describe.runIf(mountable)('a full file system', () => {
  const cases: (Case & { type: 'ext4' | 'xfs' })[] = [
    { ...base, clusterSize: 64 * KiB, fill: 'compressed', snapshots: 2, type: 'ext4' },
    { ...base, clusterSize: 64 * KiB, fill: 'discards', snapshots: 2, type: 'xfs' },
    { ...base, clusterSize: 4 * KiB, fill: 'random', snapshots: 2, type: 'ext4' },
    { ...base, clusterSize: 4 * KiB, fill: 'compressed', type: 'xfs' },
    { ...base, clusterSize: 64 * KiB, fill: 'discards', extended: true, type: 'ext4' },
    { ...base, clusterSize: 2 * MiB, fill: 'zeros', snapshots: 2, type: 'ext4' },
    { ...base, clusterSize: 64 * KiB, fill: 'random', version: 2, type: 'ext4' },
    { ...base, clusterSize: 512, fill: 'compressed', snapshots: 2, type: 'ext4' },
  ];

  it.each(cases)('lets QEMU rewrite the whole disk: $fill, cluster $clusterSize, $type', async (one) => {
    await using filesystem = await mountFilesystem({ type: one.type, size: GiB });
    const file = join(filesystem.path, 'image.qcow2');
    await make(file, one, seed);
    await must(tool, 'allocate', file, { level: 'falloc' });
    const before = hostBytes(file);
    // The file system keeps nothing for anybody else.
    const filler = join(filesystem.path, 'filler');
    for (let piece = 256 * MiB; piece >= 4 * KiB; piece /= 2) {
      for (let i = 0; i < 4; i++) await mustRun('sh', ['-c', `fallocate -l ${piece} ${filler}-${piece}-${i} || true`]);
    }
    const size = sizeOf(one);
    const step = 1 * MiB;
    const writes = Array.from({ length: Math.ceil(size / step) }, (_, i) => {
      const length = Math.min(step, size - i * step);
      return `write -P ${1 + (i % 200)} ${i * step} ${length}`;
    });
    await qemuIo(file, [...writes, 'flush'], ['-f', 'qcow2', '-t', 'none']);
    expect(hostBytes(file)).toBeLessThanOrEqual(before * 1.005);
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
  });

  it('is no reason to fill what lies outside the range', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, { ...base, clusterSize: 64 * KiB }, 2 * GiB);
    await qemuIo(file, ['write -c -P 7 0 64k']);
    await must(tool, 'allocate', file, { level: 'metadata' });
    const answer = await must(tool, 'allocate', file, { level: 'falloc', length: 64 * MiB });
    expect(answer.needed.reserve).toBeGreaterThan(0);
    const added = answer.needed.reserve * 64 * KiB;
    expect(hostBytes(file)).toBeGreaterThan(64 * MiB);
    expect(hostBytes(file)).toBeLessThan(66 * MiB + added);
    await mustRun('rm', [file]);
  });

  it('without fallocate gets its new clusters by writing', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext3-format', size: GiB });
    const file = join(filesystem.path, 'image.qcow2');
    await create(file, { ...base, clusterSize: 64 * KiB }, 100 * MiB);
    await qemuIo(file, ['write -P 7 10M 3M']);
    const original = scratchPath('original.qcow2');
    copyFileSync(file, original);
    const answer = await must(tool, 'allocate', file, { level: 'falloc' });
    expect(answer.reserved).toBe(false);
    expect(hostBytes(file)).toBeGreaterThanOrEqual(100 * MiB);
    expect(await check(file)).toEqual(CLEAN);
    await qemuImg('compare', original, file);
  });
});

describe.runIf(able)('sizes', () => {
  it('16 TiB are mapped within the limits of memory', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, { ...base, clusterSize: 64 * KiB }, 16 * 1024 * GiB);
    await qemuIo(file, ['write -P 7 9T 3M', 'write -P 8 17592186040320 4096']);
    const part = { level: 'metadata', offset: 8 * 1024 * GiB, length: 64 * GiB };
    const answer = await must(tool, 'allocate', file, part);
    expect(answer.mapped).toBe(64 * GiB);
    expect(await check(file)).toEqual(CLEAN);
    const { extents, peakKiB } = await must(tool, 'map', file);
    expect(extents.reduce((sum, [, length]) => sum + length, 0)).toBe(16 * 1024 * GiB);
    expect(Math.max(peakKiB, answer.peakKiB)).toBeLessThan(200 * KiB);
    await mustRun('rm', [file]);
  });

  it.each([512, 4096, 65536, 2 * MiB])('an image of one cluster of %i bytes', async (clusterSize) => {
    for (const size of [512, clusterSize]) {
      const file = scratchPath('image.qcow2');
      await create(file, { ...base, clusterSize }, size);
      const answer = await must(tool, 'allocate', file, { level: 'full' });
      expect(answer.mapped).toBe(clusterSize);
      expect(await check(file)).toEqual(CLEAN);
      expect((await must(tool, 'map', file)).extents.map(([offset, length, state]) => [offset, length, state])).toEqual([
        [0, size, 3],
      ]);
    }
  });

  it('nothing at all', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, { ...base, clusterSize: 65536 }, 0);
    expect(await must(tool, 'allocate', file)).toMatchObject({ mapped: 0 });
    expect((await must(tool, 'map', file)).extents).toEqual([]);
    await create(file, { ...base, clusterSize: 65536 }, MiB);
    expect(await must(tool, 'allocate', file, { length: 0 })).toMatchObject({ mapped: 0 });
    expect(statSync(file).size).toBeLessThan(MiB);
  });
});
