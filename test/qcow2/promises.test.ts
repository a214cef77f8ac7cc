/** What is promised must hold when the file system is full, and when others meddle. */
import { chmodSync, statfsSync, statSync } from 'node:fs';
import { open as fsOpen } from 'node:fs/promises';
import { dirname } from 'node:path';
import { describe, expect, it } from 'vitest';
import { Descriptor, READ_ONLY } from '../../lib/descriptor.js';
import { FileExtents } from '../../lib/extent-source.js';
import { readFilesystem } from '../../lib/filesystem.js';
import { open } from '../../lib/index.js';
import { native } from '../../lib/native.js';
import { findNeeds } from '../../lib/qcow2/needs.js';
import { qcow2Route } from '../../lib/routes/qcow2.js';
import type { MapEntry, Verdict } from '../../lib/types.js';
import { create } from '../native/qcow2-cases.js';
import { check, CLEAN, GiB, KiB, MiB, qemuImg, qemuIo } from '../native/qcow2-tool.js';
import { mountFilesystem } from '../support/filesystems.js';
import { createEncrypted } from '../support/qemu-io.js';
import { filefrag } from '../support/judges.js';
import { sparseChecksum } from '../support/patterns.js';
import { cliMain, mustRun, run } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { waitFor } from '../support/wait.js';
import { scratchPath } from '../support/scratch.js';
import { cliJson, type Refusal } from '../storage/helpers.js';
import { allocate, hostBytes, keepingContent, mapOf, TOOLS, verify } from './helpers.js';

const able = requires({ tools: TOOLS });
const mountable = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4', 'mkfs.xfs'] });
const truncates = requires({ tools: [...TOOLS, 'perl'] });
const asOther = requires({ root: true, tools: [...TOOLS, 'setpriv'] });
const base = { clusterSize: 64 * KiB, version: 3, refcountBits: 16, extended: false } as const;

function freeOf(path: string): number {
  const { bavail, bsize } = statfsSync(path);
  return bavail * bsize;
}

/** Until not one block is left; somebody else's doing. */
async function fill(path: string): Promise<void> {
  const script = `for bs in 1M 4k; do dd if=/dev/zero of=${path}/filler.$bs bs=$bs; done 2>/dev/null; sync`;
  await mustRun('sh', ['-c', script]);
  expect(freeOf(path)).toBeLessThan(MiB);
}

async function compressed(file: string, size: number): Promise<void> {
  const raw = scratchPath('content.raw');
  await mustRun('sh', ['-c', `yes abcdefgh | head -c ${size} > ${raw}`]);
  await qemuImg('convert', '-c', '-f', 'raw', '-O', 'qcow2', raw, file);
  await mustRun('rm', [raw]);
}

/** Leaves what an L1 entry leads to with counts, and without a reference. */
async function forgetTable(file: string, index: number): Promise<void> {
  await using handle = await fsOpen(file, 'r+');
  const header = Buffer.alloc(48);
  await handle.read(header, 0, header.length, 0);
  await handle.write(Buffer.alloc(8), 0, 8, Number(header.readBigUInt64BE(40)) + 8 * index);
}

/** Says that its data file is a raw disk by itself. */
async function markRaw(file: string): Promise<void> {
  const RAW = 2;
  await mustRun('sh', ['-c', `printf '\\00${RAW}' | dd of=${file} bs=1 seek=95 conv=notrunc status=none`]);
}

async function rewrite(file: string, size: number): Promise<void> {
  const writes = Array.from({ length: size / MiB }, (_, i) => `write -P ${1 + (i % 200)} ${i * MiB} ${MiB}`);
  await qemuIo(file, [...writes, 'flush'], ['-f', 'qcow2', '-t', 'none']);
  expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
}

const whys = ({ missing }: Verdict) => missing.map(({ why }) => why).join();

describe.runIf(mountable)('tables', () => {
  // 200 MiB of clusters move: their counts lie in a part of the refcount block that was a hole.
  it('in holes get blocks: a guest can rewrite what must move on a full disk', { timeout: 120_000 }, async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    const source = scratchPath('source.qcow2');
    await compressed(source, 200 * MiB);
    await mustRun('cp', ['--sparse=always', source, file]);
    await keepingContent(file, () => allocate(file));
    await fill(filesystem.path);
    await rewrite(file, 200 * MiB);
  });

  it.each(['ext4', 'xfs', 'ext3-format'] as const)('in holes are seen by verify on %s', async (type) => {
    await using filesystem = await mountFilesystem({ type, size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    const source = scratchPath('source.qcow2');
    await create(source, base, 16 * MiB);
    await qemuIo(source, ['write -P 3 0 16M']);
    await allocate(source);
    await mustRun('cp', ['--sparse=always', source, file]);
    const before = await verify(file);
    expect(before.satisfied).toBe(false);
    expect(whys(before)).toContain('reserve');
    await keepingContent(file, () => allocate(file));
    expect(await verify(file)).toMatchObject({ satisfied: true, missing: [] });
    const [first] = await filefrag(file);
    expect(first?.offset).toBe(0);
  });

  it('get blocks where the file ends within one, without fallocate', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext3-format', size: 256 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 16 * MiB);
    await allocate(file);
    await qemuImg('bitmap', '--add', file, 'b0');
    expect(statSync(file).size % (64 * KiB)).toBeGreaterThan(0);
    expect((await verify(file)).satisfied).toBe(false);
    await using image = await open(file);
    await keepingContent(file, () => image.allocate().result);
    const last = (await filefrag(file)).at(-1)!;
    expect(last.offset + last.length).toBeGreaterThanOrEqual(statSync(file).size);
    // Where nothing can be reserved, there is no room for the bitmap that QEMU stores anew.
    const after = await verify(file);
    expect(after.missing).toHaveLength(1);
    expect(whys(after)).toContain('reserve');
  });

  it('alone are progress too', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 256 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await compressed(file, 32 * MiB);
    await using image = await open(file);
    const job = image.allocate();
    await job.result;
    const { position, total } = job.progress();
    expect(total).toBeGreaterThan(32 * MiB);
    expect(position).toBe(total);
  });

  it('that a reflink shares get blocks of their own', { timeout: 120_000 }, async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    const source = `${filesystem.path}/source.qcow2`;
    await create(source, base, 200 * MiB);
    await qemuIo(source, ['write -P 5 0 200M', 'write -z 0 200M']);
    await mustRun('cp', ['--reflink=always', source, file]);
    const before = await verify(file, { length: 64 * KiB });
    expect(whys(before)).toContain('reserve');
    await keepingContent(file, () => allocate(file));
    const extents = await filefrag(file);
    expect(extents.length).toBeGreaterThan(0);
    expect(extents.filter(({ flags }) => flags.includes('shared'))).toEqual([]);
    expect((await verify(file)).satisfied).toBe(true);
    await fill(filesystem.path);
    await rewrite(file, 200 * MiB);
  });

  it('that are shared, and clusters too, count in the comparison of space', async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    const source = `${filesystem.path}/source.qcow2`;
    await create(source, base, 100 * MiB);
    await qemuIo(source, ['write -P 5 0 100M']);
    await mustRun('cp', ['--reflink=always', source, file]);
    const leave = freeOf(filesystem.path) - 60 * MiB;
    await mustRun('fallocate', ['-l', String(leave), `${filesystem.path}/filler`]);
    const before = hostBytes(file);
    // In small chunks: some of them would fit.
    await expect(allocate(file, { speed: 200 * MiB })).rejects.toMatchObject({ code: 'ENOSPC' });
    expect(hostBytes(file)).toBe(before);
    expect((await filefrag(file)).every(({ flags }) => flags.includes('shared'))).toBe(true);
  });
});

/** Writes to a part of each cluster, in a falling order. QEMU fills in what is around it. */
async function touch(file: string, size: number, length = 4 * KiB): Promise<void> {
  const starts = Array.from({ length: size / (64 * KiB) }, (_, i) => size - (i + 1) * 64 * KiB);
  const writes = starts.map((start) => `write -P 9 ${start + 5 * length} ${length}`);
  await qemuIo(file, [...writes, 'flush'], ['-f', 'qcow2', '-t', 'none']);
  expect(await check(file)).toEqual(CLEAN);
}

async function promised(file: string, request: Parameters<typeof allocate>[1] = {}): Promise<void> {
  const result = await keepingContent(file, () => allocate(file, request));
  expect(result.guarantee).toBe(true);
  const { format, preallocation } = request;
  expect((await verify(file, { ...(format && { format }), ...(preallocation && { preallocation }) })).satisfied).toBe(true);
}

describe.runIf(mountable)('clusters that are marked as zeros, and have storage', () => {
  const size = 16 * MiB;
  const zeros = [`write -P 5 0 ${size}`, `write -z 0 ${size}`];

  it.each(['xfs', 'ext4'] as const)('take a write to a part of them on a full %s', { timeout: 60_000 }, async (type) => {
    await using filesystem = await mountFilesystem({ type, size: 384 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, size);
    await qemuIo(file, zeros);
    const before = await verify(file);
    expect(before.satisfied).toBe(false);
    expect(whys(before)).toContain('may need new host blocks');
    const blocks = hostBytes(file);
    await promised(file);
    expect(hostBytes(file)).toBeLessThan(blocks + MiB);
    await fill(filesystem.path);
    await touch(file, size);
  });

  it.each(['falloc', 'full'] as const)('do so where snapshots have them too: %s', { timeout: 60_000 }, async (preallocation) => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: 384 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, size);
    await qemuIo(file, zeros);
    await qemuImg('snapshot', '-c', 'then', file);
    await promised(file, { preallocation });
    await fill(filesystem.path);
    await touch(file, size);
  });

  it('do so in parts', { timeout: 60_000 }, async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: 384 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, { ...base, extended: true }, size);
    await qemuIo(file, Array.from({ length: 256 }, (_, i) => `write -P 5 ${i * 64 * KiB} 2K`));
    await promised(file);
    await fill(filesystem.path);
    await touch(file, size, KiB);
  });

  it.each([
    ['xfs', 'off'],
    ['xfs', 'on'],
    ['ext4', 'off'],
  ] as const)('do so in a data file of old bytes: %s, raw %s', { timeout: 60_000 }, async (type, raw) => {
    await using filesystem = await mountFilesystem({ type, size: 384 * MiB });
    const [file, data] = [`${filesystem.path}/image.qcow2`, `${filesystem.path}/data.raw`];
    const options = `data_file=${data},data_file_raw=${raw}`;
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', options, file, String(size));
    // Only without `raw` may the file hold anything where the image has nothing.
    if (raw === 'off') await mustRun('sh', ['-c', `yes garbage | head -c ${size / 2} > ${data}`]);
    await qemuIo(file, ['write -P 3 1M 1M'], ['-f', 'qcow2']);
    await promised(file, { format: 'qcow2' });
    await fill(filesystem.path);
    await touch(file, size);
    await qemuIo(file, ['read -P 0 0 4k', 'read -P 3 1M 4k', `read -P 0 ${size - 4 * KiB} 4k`], ['-f', 'qcow2']);
  });

  it.each(['', ',extended_l2=on'])('leave nothing old where a disk that is made larger reads it%s', async (options) => {
    const [file, data] = [scratchPath('image.qcow2'), scratchPath('data.raw')];
    const end = size + 5 * KiB;
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${data}${options}`, file, String(end));
    await mustRun('sh', ['-c', `yes garbage | head -c ${size + MiB} > ${data}`]);
    for (const preallocation of ['metadata', 'falloc', 'full'] as const) {
      await allocate(file, { format: 'qcow2', preallocation });
      const larger = scratchPath('larger.qcow2');
      await mustRun('cp', [file, larger]);
      await mustRun('cp', ['--sparse=always', data, `${data}.larger`]);
      await qemuImg('amend', '-f', 'qcow2', '-o', `data_file=${data}.larger`, larger);
      await qemuImg('resize', '-q', larger, String(size + 2 * MiB));
      await qemuIo(larger, [`read -P 0 0 ${size + 2 * MiB}`], ['-f', 'qcow2']);
    }
    expect(statSync(data).size).toBe(size + MiB);
  });

  it.each(['falloc', 'full'] as const)('leave what a raw data file has behind the disk to its readers (%s)', async (preallocation) => {
    const [file, data] = [scratchPath('image.qcow2'), scratchPath('data.raw')];
    const [end, more] = [size + 5 * KiB, 10 * KiB];
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${data}`, file, String(end));
    await markRaw(file);
    await mustRun('sh', ['-c', `yes more | head -c ${more} >> ${data}`]);
    const before = `${data}.before`;
    await mustRun('cp', [data, before]);
    await allocate(file, { format: 'qcow2', preallocation });
    await mustRun('cmp', [before, data]);
    // It is the disk, and stays so when that is made larger.
    await qemuImg('resize', '-q', file, String(end + MiB));
    await qemuImg('compare', '-f', 'raw', '-F', 'qcow2', data, file);
    await mustRun('cmp', ['-n', String(end + more), before, data]);
  });

  // As QEMU before 6.1 made them over a disk that was there.
  it.each(['falloc', 'full'])('keep what a raw data file has, of which the tables know nothing (%s)', async (preallocation) => {
    const [file, data] = [scratchPath('image.qcow2'), scratchPath('data.raw')];
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${data}`, file, String(size));
    await mustRun('sh', ['-c', `yes content | head -c ${size} > ${data}`]);
    await markRaw(file);
    const before = await sparseChecksum(data);
    const args = ['allocate', file, '--format', 'qcow2', '--preallocation', preallocation];
    const { status, document } = await cliJson<Refusal>(args);
    expect(document.error).toMatchObject({ code: 'QCOW2_CORRUPT', message: expect.stringContaining('--format raw') });
    expect(status).toBe(1);
    expect(await sparseChecksum(data)).toBe(before);
  });

  // QEMU writes the ciphertext of zeros around a write, and zeroes nothing.
  it('stay so in an encrypted image, and take the write all the same', { timeout: 60_000 }, async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: 384 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    const secret = ['--object', 'secret,id=s,data=abc'];
    const opened = `driver=qcow2,encrypt.key-secret=s,file.filename=${file}`;
    const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10';
    await createEncrypted(...secret, '-f', 'qcow2', '-o', options, file, String(size));
    await mustRun('qemu-io', [...secret, '--image-opts', ...zeros.flatMap((one) => ['-c', one]), opened]);
    expect(await allocate(file)).toMatchObject({ guarantee: true });
    await fill(filesystem.path);
    const writes = Array.from({ length: size / (64 * KiB) }, (_, i) => ['-c', `write -P 9 ${i * 64 * KiB + 4 * KiB} 4k`]);
    const output = await mustRun('qemu-io', [...secret, '--image-opts', ...writes.flat(), opened]);
    expect(output).not.toMatch(/failed|error/i);
  });

  it('have no promise where a snapshot has data beside them', async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: 384 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, { ...base, extended: true }, MiB);
    await qemuIo(file, ['write -P 5 0 2K']);
    await qemuImg('snapshot', '-c', 'then', file);
    const result = await keepingContent(file, () => allocate(file));
    expect(result).toMatchObject({ verified: true, guarantee: false });
    expect(result.warnings.join()).toContain('marked as zeros in part');
  });
});

describe.runIf(mountable)('what a write moves', () => {
  it.each(['xfs', 'ext4'] as const)('may go to where compressed data was before on a full %s', { timeout: 60_000 }, async (type) => {
    await using filesystem = await mountFilesystem({ type, size: 384 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 4 * MiB);
    // Each time QEMU begins a new cluster for what it packs, and leaves the rest of it a hole.
    for (let i = 0; i < 64; i++) await qemuIo(file, [`write -c -P ${i} ${i * 64 * KiB} 64k`]);
    expect((await verify(file)).satisfied).toBe(false);
    await promised(file);
    await fill(filesystem.path);
    await touch(file, 4 * MiB);
  });

  // Each block counts 64 clusters, and the table has room for 64 of them.
  it.each([1500, 1900, 3900])('finds its counts where the image has few: %i KiB', { timeout: 60_000 }, async (size) => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 128 * MiB, mkfsArgs: ['-m', '0', '-b', '1024'] });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, { ...base, clusterSize: 512, refcountBits: 64 }, size * KiB);
    await qemuIo(file, [`write -P 5 0 ${size}k`]);
    await qemuImg('snapshot', '-c', 'then', file);
    await promised(file);
    const before = hostBytes(file);
    await fill(filesystem.path);
    await qemuIo(file, [`write -P 6 0 ${size}k`, 'flush'], ['-f', 'qcow2', '-t', 'none']);
    expect(hostBytes(file)).toBe(before);
    expect(await check(file)).toEqual(CLEAN);
  });

  it('leaves room for the bitmaps that QEMU stores when it closes the image', { timeout: 60_000 }, async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 128 * MiB, mkfsArgs: ['-m', '0'] });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, { ...base, clusterSize: 4 * KiB }, 16 * MiB);
    for (const name of ['b0', 'b1']) await qemuImg('bitmap', '--add', '-g', '512', file, name);
    await promised(file);
    await fill(filesystem.path);
    await qemuIo(file, ['write -P 6 0 16M', 'flush'], ['-f', 'qcow2', '-t', 'none']);
    expect(await check(file)).toEqual(CLEAN);
    expect((await qemuImg('info', file)).match(/in-use/g)).toBeNull();
  });
});

describe.runIf(mountable)('what is to be kept free', () => {
  it('is kept from the reserve for later writes too', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await compressed(file, 200 * MiB);
    const keepFree = freeOf(filesystem.path) - 50 * MiB;
    await expect(allocate(file, { keepFree })).rejects.toMatchObject({ code: 'KEEP_FREE' });
    expect(freeOf(filesystem.path)).toBeGreaterThanOrEqual(keepFree);
    expect(await check(file)).toEqual(CLEAN);
    await allocate(file, { keepFree: keepFree - 200 * MiB });
  });

  it('is kept from tables and counts too, which small clusters need many of', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, { ...base, clusterSize: 512 }, 200 * MiB);
    const keepFree = freeOf(filesystem.path) - 201 * MiB;
    await expect(allocate(file, { keepFree })).rejects.toMatchObject({ code: 'KEEP_FREE' });
    expect(freeOf(filesystem.path)).toBeGreaterThanOrEqual(keepFree);
    expect(hostBytes(file)).toBeGreaterThan(180 * MiB);
    expect(await check(file)).toEqual(CLEAN);
    await allocate(file, { keepFree: keepFree - 5 * MiB });
    expect(freeOf(filesystem.path)).toBeGreaterThanOrEqual(keepFree - 5 * MiB);
  });

  it('is kept from clusters without blocks that leaked, which a reserve takes in', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    const source = scratchPath('source.qcow2');
    await compressed(source, 32 * MiB);
    await qemuImg('resize', '-q', source, '700M');
    await qemuIo(source, ['write -P 0 512M 128M']);
    await forgetTable(source, 1);
    expect(await check(source)).toMatchObject({ leaks: 128 * MiB / (64 * KiB) + 1, corruptions: 0 });
    await mustRun('cp', ['--sparse=always', source, file]);
    const keepFree = freeOf(filesystem.path) - 60 * MiB;
    await expect(allocate(file, { keepFree, length: 32 * MiB })).rejects.toMatchObject({ code: 'KEEP_FREE' });
    expect(freeOf(filesystem.path)).toBeGreaterThanOrEqual(keepFree);
  });

  async function apart(options = ''): Promise<{ path: string; file: string } & AsyncDisposable> {
    const filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const { path } = filesystem;
    const file = scratchPath('image.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${path}/data.raw${options}`, file, '200M');
    return { path, file, [Symbol.asyncDispose]: () => filesystem.dispose() };
  }

  it('is kept where the data file lies', async () => {
    await using filesystem = await apart();
    const { path, file } = filesystem;
    const keepFree = freeOf(path) - 50 * MiB;
    await expect(allocate(file, { keepFree, format: 'qcow2' })).rejects.toMatchObject({ code: 'KEEP_FREE' });
    expect(freeOf(path)).toBeGreaterThanOrEqual(keepFree - MiB);
    expect(await check(file)).toEqual(CLEAN);
  });

  it('is kept where the tables of a data file’s image lie', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 64 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    const data = scratchPath('data.raw');
    const options = `data_file=${data},cluster_size=512`;
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', options, file, '200M');
    const before = hostBytes(data);
    const keepFree = freeOf(filesystem.path) - MiB;
    await expect(allocate(file, { keepFree, format: 'qcow2' })).rejects.toMatchObject({ code: 'KEEP_FREE' });
    expect(hostBytes(data)).toBe(before);
    expect(freeOf(filesystem.path)).toBeGreaterThanOrEqual(keepFree);
  });

  it('and what both files take of one file system, is compared before the first write', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: 512 * MiB });
    const { path } = filesystem;
    const [file, data] = [`${path}/image.qcow2`, `${path}/data.raw`];
    const options = `data_file=${data},cluster_size=512`;
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', options, file, '200M');
    await mustRun('fallocate', ['-l', String(freeOf(path) - 202 * MiB), `${path}/filler`]);
    const before = [hostBytes(file), hostBytes(data)];
    const error = await allocate(file, { format: 'qcow2' }).catch((caught: unknown) => caught);
    expect(error).toMatchObject({ code: 'ENOSPC' });
    expect((error as { needed: number }).needed).toBeGreaterThan(202 * MiB);
    expect([hostBytes(file), hostBytes(data)]).toEqual(before);
  });
});

describe.runIf(mountable)('without fallocate', () => {
  it('what later writes move has no reserve, and nothing is promised', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext3-format', size: 512 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await compressed(file, 64 * MiB);
    await using image = await open(file);
    const result = await image.allocate().result;
    expect(result).toMatchObject({ verified: false, guarantee: false });
    expect(result.warnings.join()).toContain('reserve');
    expect((await verify(file)).satisfied).toBe(false);
  });
});

describe.runIf(mountable)('zeros of full', () => {
  it.each([
    ['ext3-format', 3],
    ['ext3-format', 2],
    ['ext4', 2],
  ] as const)('come chunk by chunk, as the speed lets them: %s, version %i', { timeout: 120_000 }, async (type, version) => {
    await using filesystem = await mountFilesystem({ type, size: 1536 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, { ...base, version }, GiB);
    // Old bytes that are counted nowhere: what version 2 maps of them must be zeroed first.
    await mustRun('sh', ['-c', `yes garbage | head -c ${512 * MiB} >> ${file}`]);
    const before = hostBytes(file);
    await using image = await open(file);
    const job = image.allocate({ preallocation: 'full', speed: 4 * MiB });
    const most = 128 * MiB;
    await new Promise<void>((resolve) => job.on('progress', ({ position }) => position > 0 && resolve()));
    job.cancel();
    const error = await job.result.catch((caught: unknown) => caught);
    expect(error).toMatchObject({ code: 'CANCELLED' });
    // On ext4 they are reserved ahead, which writes nothing.
    if (type !== 'ext4') expect(hostBytes(file) - before).toBeLessThan(most);
    expect((error as { done: { allocated: number } }).done.allocated).toBeLessThan(most);
    const mapped = (await mapOf(file)).filter(({ data }) => data).reduce((sum, { length }) => sum + length, 0);
    if (version === 2 && type === 'ext4') expect(mapped).toBeLessThan(most);
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
    await qemuIo(file, ['read -P 0 0 64M']);
  });
});

describe.runIf(able)('chunks', () => {
  it('are cut by the tables as they are once the locks are held', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, base, 64 * MiB);
    await using descriptor = await Descriptor.open(file, READ_ONLY);
    const files = { file: new FileExtents(descriptor, await readFilesystem(descriptor)), data: null };
    const range = { offset: 0, length: 64 * MiB };
    const request = { level: 'falloc', exclusive: false, keepsFree: false, range } as const;
    const route = qcow2Route({ ...request, image: descriptor, files, size: range.length, granularity: base.clusterSize });
    const cutNow = async () => {
      await using session = await route.open(new (native().CancelFlag)());
      return session.cut?.chunk.bytes;
    };
    const tablesOnly = await cutNow();
    expect(tablesOnly).toBeGreaterThan(GiB);
    // What has storage and is marked as zeros is made zeros first.
    await qemuIo(file, ['write 1M 1M', 'write -z 1M 1M']);
    expect(await cutNow()).toBe(64 * MiB);
    await qemuIo(file, ['write 1M 1M']);
    expect(await cutNow()).toBe(tablesOnly);
  });
});

describe.runIf(mountable)('a file system that somebody else fills meanwhile', () => {
  it('ends the run, which tells what was allocated', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 600 * MiB);
    await using image = await open(file);
    const job = image.allocate({ speed: 100 * MiB });
    await new Promise<void>((resolve) => job.on('progress', ({ position }) => position > 0 && resolve()));
    job.pause();
    await fill(filesystem.path);
    job.resume();
    job.setSpeed(Infinity);
    const error = await job.result.catch((caught: unknown) => caught);
    expect(error).toMatchObject({ code: 'ENOSPC' });
    const { allocated } = (error as { done: { allocated: number } }).done;
    expect(allocated).toBeGreaterThan(0);
    expect(allocated).toBeLessThan(600 * MiB);
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
  });
});

describe.runIf(mountable)('a cancel', () => {
  it('ends the run without the reserve', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext4', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    await compressed(file, 200 * MiB);
    await qemuImg('resize', '-q', file, '264M');
    await using image = await open(file);
    const job = image.allocate({ speed: 20 * MiB });
    await new Promise<void>((resolve) => job.on('progress', ({ position }) => position > 0 && resolve()));
    job.cancel();
    await expect(job.result).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(hostBytes(file)).toBeLessThan(100 * MiB);
    expect((await verify(file)).satisfied).toBe(false);
    await keepingContent(file, () => allocate(file));
    expect(hostBytes(file)).toBeGreaterThan(264 * MiB);
  });

  it.each(['metadata', 'falloc'] as const)('tells what was allocated until then, without what lies between (%s)', { timeout: 60_000 }, async (preallocation) => {
    const file = scratchPath('image.qcow2');
    const size = 4 * GiB;
    await create(file, { ...base, clusterSize: 512 }, size);
    await allocate(file, { preallocation, offset: 100 * MiB, length: 800 * MiB });
    const isMapped = ({ data, offset }: MapEntry) => data || offset !== undefined;
    const mapped = async () => (await mapOf(file)).filter(isMapped).reduce((sum, { length }) => sum + length, 0);
    const [before, start] = [await mapped(), statSync(file).size];
    await using image = await open(file);
    const job = image.allocate({ preallocation });
    const ended = job.result.catch((caught: unknown) => caught);
    // One call maps what 16 MiB of tables tell of, which is a GiB here; a chunk is larger.
    await waitFor('the first call to be at work', async () => statSync(file).size > start);
    job.cancel();
    const error = await ended;
    expect(error).toMatchObject({ code: 'CANCELLED' });
    const added = (await mapped()) - before;
    expect(added).toBeGreaterThan(0);
    expect(added).toBeLessThan(2 * GiB);
    expect((error as { done: { allocated: number } }).done.allocated).toBe(added);
  });

  it('of full tells nothing that was not written', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, { ...base, clusterSize: 512 }, 4 * GiB);
    const start = statSync(file).size;
    await using image = await open(file);
    const job = image.allocate({ preallocation: 'full' });
    const ended = job.result.catch((caught: unknown) => caught);
    await waitFor('the first call to be at work', async () => statSync(file).size > start);
    job.cancel();
    expect(await ended).toMatchObject({ code: 'CANCELLED', done: { allocated: 0 } });
  });

  it('is heeded while the tables are read', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, base, 64 * MiB);
    await qemuIo(file, ['write 0 1M']);
    await using descriptor = await Descriptor.open(file, READ_ONLY);
    const files = { file: new FileExtents(descriptor, await readFilesystem(descriptor)), data: null };
    const cancel = new (native().CancelFlag)();
    cancel.cancel();
    const request = { range: { offset: 0, length: 64 * MiB }, level: 'falloc' } as const;
    await expect(findNeeds(files, request, cancel)).rejects.toMatchObject({ code: 'CANCELLED', path: file });
  });
});

describe.runIf(truncates)('a file that is truncated by its name', () => {
  it.each(['container', 'data file'])('ends the run in an error, and is not grown again: the %s', { timeout: 60_000 }, async (which) => {
    const [file, data] = [scratchPath('image.qcow2'), scratchPath('data.raw')];
    const size = 256 * MiB;
    const external = which === 'data file';
    const options = external ? ['-o', `data_file=${data}`] : [];
    await qemuImg('create', '-q', '-f', 'qcow2', ...options, file, String(size));
    // Old bytes where clusters are going to be: they are made zeros chunk by chunk.
    const victim = external ? data : file;
    await mustRun('sh', ['-c', `yes garbage | head -c ${size} ${external ? '>' : '>>'} ${victim}`]);
    await using image = await open(file, external ? { format: 'qcow2' } : {});
    const job = image.allocate({ speed: 64 * MiB });
    const ended = job.result.catch((caught: unknown) => caught);
    await new Promise<void>((resolve) => job.on('progress', ({ position }) => position > 0 && resolve()));
    // Nobody opens it.
    await mustRun('perl', ['-e', 'truncate $ARGV[0], $ARGV[1] or die', victim, String(size - MiB)]);
    expect(await ended).toMatchObject({ code: 'CHANGED', path: file });
    expect(statSync(victim).size).toBe(size - MiB);
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
    await keepingContent(file, () => allocate(file, external ? { format: 'qcow2' } : {}));
  });
});

describe.runIf(able)('an image that is kept open', () => {
  it('is mapped as it is now, not as it was when it was opened', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, base, 2 * GiB);
    await using image = await open(file);
    await qemuIo(file, ['write 1G 1M']);
    const entries = [];
    for await (const entry of image.map()) entries.push(entry);
    expect(entries).toEqual(await mapOf(file));
    expect(entries.some(({ start, data }) => data && start === GiB)).toBe(true);
    await qemuIo(file, ['write 1536M 1M']);
    const starts = [];
    for await (const { offset, data } of image.extents()) if (data) starts.push(offset);
    expect(starts).toContain(1536 * MiB);
  });
});

describe.runIf(asOther)('on tmpfs', () => {
  it('whoever may only read an image is told that reserved can’t be told from missing', async () => {
    await using filesystem = await mountFilesystem({ type: 'tmpfs', size: 64 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 16 * MiB);
    await allocate(file);
    chmodSync(file, 0o444);
    // The way to it, for everybody.
    for (let at = dirname(file); at !== '/'; at = dirname(at)) chmodSync(at, statSync(at).mode | 0o111);
    const user = ['--reuid=65534', '--regid=65534', '--clear-groups', '--inh-caps=-all', '--bounding-set=-all'];
    const { stdout, stderr, status } = await run('setpriv', [...user, process.execPath, cliMain, 'verify', file, '--json']);
    expect(stderr).not.toContain('EPERM');
    expect(status).toBe(3);
    expect((JSON.parse(stdout) as Verdict).warnings.join()).toContain('can’t tell reserved from missing');
  });
});
