import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { closeSync, fstatSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { open as openFile, stat } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import type { AllocationResult, ImageInfo, MapEntry, Verdict } from '../../lib/types.js';
import { hold } from '../support/cleanup.js';
import { mountFilesystem } from '../support/filesystems.js';
import { filefrag, hostBytes } from '../support/judges.js';
import { attachLoop, writePartitionTable, type Loop } from '../support/loop.js';
import { makePattern, sha256, type Segment } from '../support/patterns.js';
import { mustRun, spawnCli, startQemu } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import {
  allocate,
  bytesOf,
  cliJson,
  EXT4,
  expectOneLine,
  holdOpen,
  KiB,
  makeSparse,
  MiB,
  missing,
  startAllocation,
  TOOLS,
  type Refusal,
} from './helpers.js';

const runnable = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, 'dd', 'mkfs.ext4', 'partx', 'mknod', 'qemu-storage-daemon', 'qemu-system-x86_64'],
});

/** Zeros that were written count as zeros too: some data is there to be kept. */
function deviceSegments(sectorSize: number): Segment[] {
  return [
    { kind: 'hole', length: 2 * MiB },
    { kind: 'data', length: 64 * KiB },
    { kind: 'hole', length: 3 * MiB + 4 * KiB },
    { kind: 'data', length: 4 * KiB },
    { kind: 'unwritten', length: 256 * KiB },
    { kind: 'data', length: MiB },
    { kind: 'hole', length: 5 * MiB + 3 * sectorSize },
  ];
}

async function patternedLoop(sectorSize: 512 | 4096): Promise<Loop> {
  const file = scratchPath('disk.raw');
  await makePattern(file, deviceSegments(sectorSize));
  return attachLoop({ file, sectorSize });
}

async function expectRefused(device: string, file: string): Promise<Refusal['error']> {
  const blocks = await hostBytes(file);
  const outcome = await cliJson<Refusal>(['allocate', device]);
  expect(outcome.status, outcome.stderr).toBe(4);
  expectOneLine(outcome, 'IN_USE');
  expect(outcome.document.error).toMatchObject({ code: 'IN_USE', path: device });
  expect(outcome.document.error.message).toContain('--qmp');
  expect(await hostBytes(file)).toBe(blocks);
  return outcome.document.error;
}

describe.runIf(runnable)('a loop device over a sparse file', () => {
  describe.each([512, 4096] as const)('with sectors of %i bytes', (sectorSize) => {
    it('has blocks reserved after falloc, written after full, and its data throughout', async () => {
      await using loop = await patternedLoop(sectorSize);
      const { size } = await stat(loop.file);
      const content = await sha256(loop.file);
      const falloc = await allocate(loop.device);
      expect(falloc).toMatchObject({
        target: loop.device,
        effective: { offset: 0, length: size },
        after: { allocated: size },
        verified: true,
        guarantee: true,
      });
      expect(falloc.allocated + falloc.skipped).toBe(size);
      expect(await missing(loop.file, 'falloc')).toEqual([]);
      const extents = await filefrag(loop.file);
      expect(extents.some(({ flags }) => flags.includes('unwritten'))).toBe(true);
      expect(await hostBytes(loop.file)).toBeGreaterThanOrEqual(size);
      expect(await sha256(loop.file)).toBe(content);
      expect((await cliJson(['verify', loop.device])).status).toBe(0);

      const full = await allocate(loop.device, '--preallocation', 'full');
      expect(full).toMatchObject({ after: { allocated: size }, verified: true });
      expect(await missing(loop.file, 'full')).toEqual([]);
      expect(await sha256(loop.file)).toBe(content);
      expect(await sha256(loop.device)).toBe(content);
      const again = await allocate(loop.device, '--preallocation', 'full');
      expect(again).toMatchObject({ allocated: 0, plan: [], verified: true });
    });

    it.each(['falloc', 'full'] as const)('has only the blocks of a range allocated (%s)', async (level) => {
      const file = makeSparse(scratchPath('range.raw'), 8 * MiB);
      await using loop = await attachLoop({ file, sectorSize });
      const range = ['--offset', String(MiB + 100), '--length', '10000', '--preallocation', level];
      const result = await allocate(loop.device, ...range);
      const effective = { offset: MiB, length: 12 * KiB };
      expect(result).toMatchObject({
        requested: { offset: MiB + 100, length: 10_000 },
        effective,
        after: { allocated: 12 * KiB },
        verified: true,
      });
      await mustRun('sync', ['-f', file]);
      expect((await filefrag(file)).map(({ offset, length }) => ({ offset, length }))).toEqual([effective]);
      expect(await hostBytes(file)).toBe(12 * KiB);
      const outside = await cliJson<Refusal>(['allocate', loop.device, '--length', String(8 * MiB + 1)]);
      expect(outside.status).toBe(2);
      expect(outside.document.error.code).toBe('RANGE');
    });
  });

  it('that ends before its file does leaves the rest of the file alone', async () => {
    const file = scratchPath('odd.raw');
    writeFileSync(file, Buffer.concat([Buffer.alloc(64 * KiB), Buffer.from('the end of the file')]));
    await mustRun('fallocate', ['--punch-hole', '--offset', '0', '--length', '65536', file]);
    const content = await sha256(file);
    await using loop = await attachLoop({ file });
    const result = await allocate(loop.device, '--preallocation', 'full');
    expect(result).toMatchObject({ effective: { offset: 0, length: 64 * KiB }, verified: true });
    expect(await sha256(file)).toBe(content);
    expect(await missing(file, 'full')).toEqual([]);
  });

  describe.each([
    { offset: 512, sectorSize: 4096, size: 8 * MiB },
    { offset: 100, sectorSize: 512, size: 8 * MiB },
    { offset: 0, sectorSize: 4096, size: MiB + KiB },
    { offset: 3 * KiB, sectorSize: 4096, size: 8 * MiB + 5 * 512 },
  ] as const)('$offset bytes into a file of $size, in sectors of $sectorSize', (layout) => {
    const { offset, sectorSize, size } = layout;
    const whole = Math.floor((size - offset) / sectorSize) * sectorSize;

    it.each(['falloc', 'full'] as const)('has its blocks allocated, and its data kept (%s)', async (level) => {
      const file = makeSparse(scratchPath('shifted.raw'), size);
      const written = randomBytes(20 * KiB);
      await patch(file, 64 * KiB, written);
      await mustRun('fallocate', ['-n', '-o', String(256 * KiB), '-l', String(20 * KiB), file]);
      const content = await sha256(file);
      await using loop = await attachLoop({ file, sectorSize, offset });
      const result = await allocate(loop.device, '--preallocation', level);
      expect(result).toMatchObject({ effective: { offset: 0, length: whole }, after: { allocated: whole }, verified: true });
      expect(await sha256(file)).toBe(content);
      expect(await missing(file, level, { offset, length: whole })).toEqual([]);
      expect(await allocate(loop.device, '--preallocation', level)).toMatchObject({ plan: [], allocated: 0 });
      expect((await cliJson(['verify', loop.device, '--preallocation', level])).status).toBe(0);
    });

    it('has a map that knows whole blocks only', async () => {
      const file = makeSparse(scratchPath('shifted.raw'), size);
      await patch(file, 64 * KiB, randomBytes(20 * KiB));
      await using loop = await attachLoop({ file, sectorSize, offset });
      const entries = (await cliJson<MapEntry[]>(['map', loop.device])).document;
      expect(entries.map(({ host }) => host)).toEqual(['hole', 'written', 'hole']);
      for (const { start } of entries) expect(start % 4096).toBe(0);
      const part = (await cliJson<MapEntry[]>(['map', loop.device, '--offset', '61000', '--length', '10'])).document;
      expect(part).toMatchObject([{ start: 61_000, length: 10, host: 'hole' }]);
    });
  });

  it('whose end is no whole sector says so', async () => {
    const file = makeSparse(scratchPath('end.raw'), MiB + KiB);
    await using loop = await attachLoop({ file, sectorSize: 4096 });
    const info = await cliJson<ImageInfo>(['info', loop.device]);
    expect(info.document).toMatchObject({ virtualSize: MiB, missing: MiB });
    expect(info.document.warnings.join('\n')).toMatch(/last 1024 bytes/);
  });

  it('has a partition of its own allocated, and nothing beside it', async () => {
    await using disk = await partitionedDisk();
    const [first] = disk.partitions;
    const result = await allocate(first!, '--preallocation', 'full');
    expect(result.effective).toEqual({ offset: 0, length: 8 * MiB });
    await mustRun('sync', ['-f', disk.file]);
    expect(await missing(disk.file, 'full', { offset: MiB, length: 8 * MiB })).toEqual([]);
    const rest = { offset: 10 * MiB, length: 8 * MiB };
    expect(await missing(disk.file, 'falloc', rest)).toEqual([rest]);
    // Which part of the file is behind it can't be told from here.
    expect(result).toMatchObject({ verified: null, guarantee: false });
    expect(result.warnings.join('\n')).toMatch(/unknowable/);
  });

  it('over another loop device has its blocks allocated at the bottom', async () => {
    for (const level of ['falloc', 'full'] as const) {
      await using lower = await patternedLoop(512);
      const content = await sha256(lower.file);
      await using upper = await attachLoop({ file: lower.device });
      await expectRefused(lower.device, lower.file);
      const result = await allocate(upper.device, '--preallocation', level);
      expect(result).toMatchObject({ verified: null, guarantee: false });
      const verdict = await cliJson<Verdict>(['verify', upper.device, '--preallocation', level]);
      expect(verdict.status).toBe(3);
      await mustRun('blockdev', ['--flushbufs', upper.device]);
      await mustRun('sync', ['-f', lower.file]);
      expect(await missing(lower.file, level)).toEqual([]);
      expect(await sha256(lower.file)).toBe(content);
    }
  });

  it('whose file has been deleted is allocated, and what is behind it is unknowable', async () => {
    const file = makeSparse(scratchPath('deleted.raw'), 4 * MiB);
    const kept = openSync(file, 'r');
    try {
      await using loop = await attachLoop({ file });
      rmSync(file);
      const result = await allocate(loop.device);
      expect(result).toMatchObject({ verified: null, guarantee: false });
      expect(fstatSync(kept).blocks * 512).toBeGreaterThanOrEqual(4 * MiB);
      expect((await cliJson(['verify', loop.device])).status).toBe(3);
    } finally {
      closeSync(kept);
    }
  });

  it('is not judged by another file that has taken the name of its own', async () => {
    const file = makeSparse(scratchPath('moved.raw'), 4 * MiB);
    await using loop = await attachLoop({ file });
    rmSync(file);
    // The name that sysfs gives for it by now, and the one that it had.
    writeFileSync(`${file} (deleted)`, randomBytes(4 * MiB));
    writeFileSync(file, randomBytes(4 * MiB));
    const verdict = await cliJson<Verdict>(['verify', loop.device]);
    expect(verdict.status).toBe(3);
    expect(verdict.document.satisfied).toBe(false);
  });

  it('that is read-only is an error, and nothing is changed', async () => {
    const file = makeSparse(scratchPath('read-only.raw'), MiB);
    await using loop = await attachLoop({ file, readOnly: true });
    const outcome = await cliJson<Refusal>(['allocate', loop.device]);
    expect(outcome.status).toBe(1);
    expectOneLine(outcome, /^(EACCES|EROFS|EPERM)$/);
    expect(await hostBytes(file)).toBe(0);
  });

  it.each(['falloc', 'full'] as const)('keeps what it reads as zero but for its data (%s)', async (level) => {
    // Written zeros and holes look the same from above: both may be zeroed out, no data may.
    const file = scratchPath('zeros.raw');
    writeFileSync(file, Buffer.concat([Buffer.alloc(MiB), randomBytes(512), Buffer.alloc(MiB - 512)]));
    const content = await sha256(file);
    await using loop = await attachLoop({ file });
    await allocate(loop.device, '--preallocation', level);
    expect(await sha256(file)).toBe(content);
    expect(await missing(file, level)).toEqual([]);
  });
});

async function patch(path: string, position: number, bytes: Buffer): Promise<void> {
  const handle = await openFile(path, 'r+');
  await handle.write(bytes, 0, bytes.length, position);
  await handle.sync();
  await handle.close();
}

async function partitionedDisk(): Promise<Loop> {
  const file = makeSparse(scratchPath('partitioned.raw'), 32 * MiB);
  await writePartitionTable(file, [
    { offset: MiB, length: 8 * MiB },
    { offset: 10 * MiB, length: 8 * MiB },
  ]);
  return attachLoop({ file, partitioned: true });
}

describe.runIf(runnable)('a device that something uses is refused', () => {
  it('mounted', async () => {
    await using mounted = await mountFilesystem(EXT4);
    await expectRefused(mounted.device!, mounted.image!);
    const info = await cliJson<{ inUse: { by: string } | null }>(['info', mounted.device!]);
    expect(info.document.inUse?.by).toMatch(/mounted/);
  });

  it.each(['guest', 'daemon'] as const)('as host_device of a running QEMU (%s)', async (kind) => {
    const file = makeSparse(scratchPath('qemu.raw'), 8 * MiB);
    await using loop = await attachLoop({ file });
    await using qemu = await startQemu({ file: loop.device, device: 'host_device', kind });
    const error = await expectRefused(loop.device, file);
    expect(error.message).toContain(String(qemu.pid));
    await qemu.dispose();
    expect(await allocate(loop.device)).toMatchObject({ allocated: 8 * MiB, verified: true });
  });

  it('by the partition of it that is mounted; the other partition is not', async () => {
    await using disk = await partitionedDisk();
    const [first, second] = disk.partitions as [string, string];
    await mustRun('mkfs.ext4', ['-q', '-F', first]);
    const folder = scratchPath('partition.mnt');
    await mustRun('mkdir', [folder]);
    await mustRun('mount', [first, folder]);
    const unmount = hold({
      release: async () => void (await mustRun('umount', [folder])),
      releaseSync: () => void execFileSync('umount', ['--lazy', folder]),
    });
    try {
      await expectRefused(disk.device, disk.file);
      await expectRefused(first, disk.file);
      expect(await allocate(second)).toMatchObject({ verified: null });
      await mustRun('sync', ['-f', disk.file]);
      expect(await missing(disk.file, 'falloc', { offset: 10 * MiB, length: 8 * MiB })).toEqual([]);
    } finally {
      await unmount();
    }
  });

  it('by the partition of it that a process has open without O_EXCL', async () => {
    await using disk = await partitionedDisk();
    await using holder = await holdOpen(disk.partitions[0]!);
    const error = await expectRefused(disk.device, disk.file);
    expect(error.message).toContain(String(holder.pid));
    await expectRefused(disk.partitions[0]!, disk.file);
  });

  it('by the disk of the partition that a process has open without O_EXCL', async () => {
    await using disk = await partitionedDisk();
    await using holder = await holdOpen(disk.device);
    const error = await expectRefused(disk.partitions[1]!, disk.file);
    expect(error.message).toContain(String(holder.pid));
  });

  it('through another node of the same device', async () => {
    const file = makeSparse(scratchPath('node.raw'), MiB);
    await using loop = await attachLoop({ file });
    const node = scratchPath('node');
    const minor = /\d+$/.exec(loop.device)![0];
    await mustRun('mknod', [node, 'b', '7', minor]);
    await using holder = await holdOpen(node);
    const error = await expectRefused(loop.device, file);
    expect(error.message).toContain(String(holder.pid));
  });

  it('by another thicken at work on it', async () => {
    const file = makeSparse(scratchPath('two.raw'), 64 * MiB);
    await using loop = await attachLoop({ file });
    await using first = await startAllocation(
      spawnCli(['allocate', loop.device, '--speed', '8M', '--progress', 'json']),
    );
    const outcome = await cliJson<Refusal>(['allocate', loop.device]);
    expect(outcome.status).toBe(4);
    expectOneLine(outcome, 'IN_USE');
    first.kill('SIGINT');
    expect((await first.exit).status).toBe(130);
    expect(await allocate(loop.device)).toMatchObject({ verified: true });
  });
});

describe.runIf(runnable)('a write between the scan and the allocation is never overwritten', () => {
  const at = 48 * MiB;
  const written = randomBytes(MiB);

  describe.each(['falloc', 'full'] as const)('%s', (level) => {
    it.each(['device', 'file'] as const)('through the %s', async (through) => {
      const file = makeSparse(scratchPath('race.raw'), 64 * MiB);
      const source = scratchPath('source');
      writeFileSync(source, written);
      await using loop = await attachLoop({ file });
      const args = ['allocate', loop.device, '--preallocation', level, '--speed', '24M'];
      await using run = await startAllocation(spawnCli([...args, '--json', '--progress', 'json']));
      const target = through === 'device' ? [`of=${loop.device}`, 'oflag=direct'] : [`of=${file}`];
      await mustRun('dd', [`if=${source}`, ...target, 'bs=1M', `seek=${at / MiB}`, 'conv=notrunc']);
      // The write must have come before the run did.
      expect(lastPosition(run.stderr())).toBeLessThan(at - 4 * MiB);
      const { status, stdout, stderr } = await run.exit;
      expect(status, stderr).toBe(0);
      expect((JSON.parse(stdout) as AllocationResult).verified).toBe(true);
      await mustRun('sync', ['-f', file]);
      expect(readBack(file)).toEqual(written);
      expect(readBack(loop.device)).toEqual(written);
      expect(bytesOf(await missing(file, level))).toBe(0);
    });
  });

  function lastPosition(stderr: string): number {
    const positions = [...stderr.matchAll(/"position":(\d+)/g)].map((match) => Number(match[1]));
    return Math.max(...positions);
  }

  function readBack(path: string): Buffer {
    const args = [`if=${path}`, 'bs=1M', `skip=${at / MiB}`, 'count=1', 'status=none'];
    return execFileSync('dd', args, { maxBuffer: 4 * MiB });
  }
});
