import { closeSync, copyFileSync, openSync, statSync, truncateSync, writeSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { open } from '../../lib/index.js';
import { create, generator } from '../native/qcow2-cases.js';
import { check, CLEAN, KiB, MiB, qemuImg, qemuIo } from '../native/qcow2-tool.js';
import { GiB } from '../storage/helpers.js';
import { mountFilesystem } from '../support/filesystems.js';
import { filefrag, qemuMap } from '../support/judges.js';
import { mustRun } from '../support/processes.js';
import { createEncrypted } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { allocate, expectTwoLevels, hostBytes, info, keepingContent, mapOf, TOOLS, verify } from './helpers.js';

const able = requires({ tools: TOOLS });
const mountable = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4', 'mkfs.xfs'] });
const base = { clusterSize: 64 * KiB, version: 3, refcountBits: 16, extended: false } as const;

async function thin(size = 64 * MiB, name = 'image.qcow2'): Promise<string> {
  const file = scratchPath(name);
  await create(file, base, size);
  await qemuIo(file, ['write -P 7 10M 3M', 'write -z 20M 1M', 'write -P 5 63M 100k']);
  return file;
}

/** The dirty bit is the lowest of the incompatible features, a big-endian number at 72. */
function markDirty(path: string): void {
  const file = openSync(path, 'r+');
  writeSync(file, Uint8Array.of(1), 0, 1, 79);
  closeSync(file);
}

describe.runIf(able)('an image that must not be written to', () => {
  it('does not satisfy verify, which says why', async () => {
    const file = await thin();
    await allocate(file);
    expect((await verify(file)).satisfied).toBe(true);
    markDirty(file);
    const { satisfied, warnings } = await verify(file);
    expect(satisfied).toBe(false);
    expect(warnings).toContainEqual(expect.stringMatching(/^no guarantee: .*qemu-img check -r all/));
  });
});

describe.runIf(able)('a range', () => {
  it('is widened to clusters, and nothing else gets storage', async () => {
    const file = await thin();
    const before = hostBytes(file);
    const result = await keepingContent(file, () => allocate(file, { offset: 9 * MiB + 5, length: 2 * MiB }));
    expect(result.effective).toEqual({ offset: 9 * MiB, length: 2 * MiB + 64 * KiB });
    expect(result.allocated).toBe(MiB);
    expect(result.skipped).toBe(MiB + 64 * KiB);
    expect(hostBytes(file) - before).toBeLessThan(MiB + 64 * KiB);
    const entries = await qemuMap(file, 'qcow2');
    expect(entries.filter(({ present }) => present).map(({ start, length }) => [start, length])).toEqual([
      [9 * MiB, MiB], [10 * MiB, 3 * MiB], [20 * MiB, MiB], [63 * MiB, 128 * KiB],
    ]);
    expect((await verify(file, { offset: 9 * MiB, length: 4 * MiB })).satisfied).toBe(true);
    expect((await verify(file)).satisfied).toBe(false);
  });

  it('of no length does nothing, and one beyond the end is refused', async () => {
    const file = await thin();
    expect(await allocate(file, { offset: MiB, length: 0 })).toMatchObject({ allocated: 0, plan: [] });
    await expect(allocate(file, { offset: 64 * MiB, length: 1 })).rejects.toMatchObject({ code: 'RANGE' });
    expect(await check(file)).toEqual(CLEAN);
  });

  it('at the end of a disk that ends within a cluster reaches to the end', async () => {
    const file = scratchPath('image.qcow2');
    await create(file, base, MiB + 512);
    const result = await keepingContent(file, () => allocate(file, { offset: MiB, preallocation: 'full' }));
    expect(result.effective).toEqual({ offset: MiB, length: 512 });
    expect(result.allocated).toBe(512);
  });

  it('takes a dry run that says what will be done, and does nothing', async () => {
    const file = await thin();
    const before = hostBytes(file);
    await using image = await open(file);
    const dry = await image.dryRun({ preallocation: 'full' });
    expect(dry).toMatchObject({ after: null, verified: null, allocated: 0 });
    expect(hostBytes(file)).toBe(before);
    const { plan } = await image.allocate({ preallocation: 'full' }).result;
    expect(plan).toEqual(dry.plan);
    expect(new Set(plan.map(({ route }) => route))).toEqual(new Set(['qcow2']));
  });
});

describe.runIf(able)('levels', () => {
  it('metadata maps everything, and takes no blocks for it', async () => {
    const file = await thin(GiB);
    const before = hostBytes(file);
    const result = await keepingContent(file, () => allocate(file, { preallocation: 'metadata' }));
    expect(result.guarantee).toBe(false);
    expect(statSync(file).size).toBeGreaterThan(GiB);
    expect(hostBytes(file) - before).toBeLessThan(MiB);
    const verdict = await verify(file, { preallocation: 'falloc' });
    expect(verdict.satisfied).toBe(false);
    expect(new Set(verdict.missing.map(({ why }) => why))).toEqual(
      new Set(['hole: mapped, with no host blocks behind it']),
    );
  });

  it('falloc reserves what metadata has mapped, full writes what falloc has reserved', async () => {
    const file = await thin();
    await keepingContent(file, async () => {
      await allocate(file, { preallocation: 'metadata' });
      const reserved = await allocate(file);
      expect(reserved.before.allocated).toBeLessThan(4 * MiB);
      expect(reserved.after?.allocated).toBe(64 * MiB);
      const verdict = await verify(file, { preallocation: 'full' });
      expect(verdict.missing.map(({ why }) => why.split(':')[0])).toContain('unwritten');
      const written = await allocate(file, { preallocation: 'full' });
      expect(written.allocated).toBeGreaterThan(60 * MiB);
      expect(written.after?.allocated).toBe(64 * MiB);
    });
    expect((await mapOf(file)).every(({ host }) => host === 'written')).toBe(true);
    const extents = await filefrag(file);
    expect(extents.filter(({ flags }) => flags.includes('unwritten'))).toEqual([]);
  });

  it('verify gives each reason, and a reserve that a later snapshot outgrows is missing', async () => {
    const file = await thin();
    const { missing } = await verify(file);
    expect([...new Set(missing.map(({ why }) => why.split(':')[0]))].sort()).toEqual(['unmapped', 'zeros']);
    await allocate(file);
    expect((await verify(file)).satisfied).toBe(true);
    await qemuImg('snapshot', '-c', 'later', file);
    const verdict = await verify(file);
    expect(verdict.satisfied).toBe(false);
    expect(verdict.missing).toEqual([
      { offset: 0, length: 64 * MiB, why: expect.stringMatching(/^the host file holds \d+ bytes too few in reserve/) as string },
    ]);
    const size = statSync(file).size;
    const result = await keepingContent(file, () => allocate(file));
    expect(result.plan.map(({ route }) => route)).toEqual(['qcow2']);
    expect(statSync(file).size).toBe(size);
    expect(hostBytes(file)).toBeGreaterThan(128 * MiB);
    expect((await verify(file)).satisfied).toBe(true);
  });

  it('a run that leaked is cleaned up by the next, also where nothing is missing', async () => {
    const file = await thin();
    await allocate(file);
    // A cluster behind the end, counted and not used.
    await leak(file);
    expect((await check(file)).leaks).toBe(1);
    expect((await verify(file)).satisfied).toBe(true);
    await keepingContent(file, () => allocate(file));
    expect(await check(file)).toEqual(CLEAN);
  });

  it('scattered clusters are mapped, joined and written like any others', { timeout: 120_000 }, async () => {
    const file = scratchPath('image.qcow2');
    await create(file, { ...base, clusterSize: 4 * KiB }, 64 * MiB);
    const next = generator(42);
    await qemuIo(file, Array.from({ length: 1500 }, (_, i) => `write -P ${i % 250} ${4096 * next(16_384)} 4k`));
    await expectTwoLevels(file);
    await keepingContent(file, () => allocate(file, { offset: MiB, length: 30 * MiB, preallocation: 'metadata' }));
    await expectTwoLevels(file);
    await keepingContent(file, () => allocate(file, { preallocation: 'full' }));
    await expectTwoLevels(file);
    expect((await verify(file, { preallocation: 'full' })).satisfied).toBe(true);
  });

  it('an encrypted image keeps its content', async () => {
    const file = scratchPath('image.qcow2');
    const secret = ['--object', 'secret,id=s,data=abc'];
    const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10';
    await createEncrypted(...secret, '-f', 'qcow2', '-o', options, file, '32M');
    const opened = `driver=qcow2,encrypt.key-secret=s,file.filename=${file}`;
    await mustRun('qemu-io', [...secret, '--image-opts', '-c', 'write -P 7 3M 1M', opened]);
    await allocate(file, { preallocation: 'full' });
    const checked = await mustRun('qemu-img', ['check', ...secret, '--image-opts', opened]);
    expect(checked).toContain('No errors were found');
    const read = await mustRun('qemu-io', [
      ...[...secret, '--image-opts', '-c', 'read -P 7 3M 1M', '-c', 'read -P 0 0 3M', '-c', 'read -P 0 4M 28M'],
      opened,
    ]);
    expect(read).not.toMatch(/failed|error/i);
  });
});

/** Adds a cluster that is counted, and that nothing uses. */
async function leak(file: string): Promise<void> {
  const cluster = Math.ceil(statSync(file).size / base.clusterSize);
  truncateSync(file, (cluster + 1) * base.clusterSize);
  await mustRun('python3', [
    '-c',
    `
import struct, sys
f = open(sys.argv[1], 'r+b')
f.seek(48)
f.seek(struct.unpack('>Q', f.read(8))[0])
f.seek(struct.unpack('>Q', f.read(8))[0] + 2 * int(sys.argv[2]))
f.write(struct.pack('>H', 1))
`,
    file,
    String(cluster),
  ]);
}

describe.runIf(mountable)('file systems', () => {
  it('without fallocate: clusters are written, and so is what was mapped before', async () => {
    await using filesystem = await mountFilesystem({ type: 'ext3-format', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    await create(file, base, 100 * MiB);
    await qemuIo(file, ['write -P 7 10M 3M']);
    await keepingContent(file, async () => {
      await allocate(file, { length: 50 * MiB, preallocation: 'metadata' });
      await allocate(file);
    });
    expect((await verify(file)).satisfied).toBe(true);
    expect(hostBytes(file)).toBeGreaterThanOrEqual(100 * MiB);
  });

  it('with reflinks: shared clusters get blocks of their own', async () => {
    await using filesystem = await mountFilesystem({ type: 'xfs', size: GiB });
    const file = `${filesystem.path}/image.qcow2`;
    copyFileSync(await thin(), file);
    await mustRun('cp', ['--reflink=always', file, `${filesystem.path}/copy.qcow2`]);
    const { missing } = await verify(file);
    expect(missing.map(({ why }) => why.split(':')[0])).toContain('shared');
    await expectTwoLevels(file);
    await keepingContent(file, () => allocate(file));
    expect((await mapOf(file)).filter(({ host }) => host === 'shared')).toEqual([]);
    expect((await verify(file)).satisfied).toBe(true);
    expect(await check(`${filesystem.path}/copy.qcow2`)).toEqual(CLEAN);
  });

  it('tmpfs: reserved pages are told from missing ones', async () => {
    await using filesystem = await mountFilesystem({ type: 'tmpfs', size: 256 * MiB });
    const file = `${filesystem.path}/image.qcow2`;
    copyFileSync(await thin(), file);
    await keepingContent(file, () => allocate(file));
    expect((await verify(file)).satisfied).toBe(true);
    expect((await info(file)).filesystem?.type).toBe('tmpfs');
  });
});
