import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { afterAll, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import type { ImageInfo } from '../../lib/types.js';
import { deviceName } from '../../lib/users.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { hostBytes } from '../support/judges.js';
import { attachLoop } from '../support/loop.js';
import { makePattern, sha256 } from '../support/patterns.js';
import { mustRun, run, spawnCli, startQemu, type Spawned } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import {
  allocate,
  cliJson,
  EXT3,
  expectOneLine,
  holdOpen,
  GiB,
  KiB,
  MiB,
  missing,
  startAllocation,
  TOOLS,
  XFS,
  type Refusal,
} from './helpers.js';

const runnable = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, 'mkfs.ext4', 'mkfs.xfs', 'qemu-io', 'qemu-storage-daemon', 'qemu-system-x86_64'],
});

async function pattern(path: string): Promise<string> {
  await makePattern(path, [
    { kind: 'hole', length: MiB },
    { kind: 'data', length: 64 * KiB },
    { kind: 'hole', length: 95 * MiB },
  ]);
  return path;
}

/** OFD locks on a file, by byte, as the kernel tells them. */
async function lockedBytes(path: string): Promise<number[]> {
  const { dev, ino } = await stat(path);
  const [major, minor] = deviceName(dev).split(':').map((part) => Number(part).toString(16).padStart(2, '0'));
  // With the device: other tests lock files of the same number on file systems of their own.
  const name = ` ${major}:${minor}:${ino} `;
  const lines = readFileSync('/proc/locks', 'utf8').split('\n').filter((line) => line.includes(name));
  const bytes = lines.flatMap((line) => {
    // Neighbours of one owner are told as one range.
    const [, first, last] = / (\d+) (\d+)$/.exec(line)!.map(Number) as [number, number, number];
    return Array.from({ length: last - first + 1 }, (_, i) => first + i);
  });
  return bytes.sort((a, b) => a - b);
}

/** A QEMU tool that opens the image for writing, and heeds locks. */
function openForWriting(path: string) {
  return run('qemu-io', ['-f', 'raw', '-c', 'write -P 7 0 512', path]);
}

async function expectRefused(path: string, ...args: string[]): Promise<string> {
  const [blocks, content] = [await hostBytes(path), await sha256(path)];
  const outcome = await cliJson<Refusal>(['allocate', path, ...args]);
  expect(outcome.status, outcome.stderr).toBe(4);
  expectOneLine(outcome, 'IN_USE');
  expect(outcome.document.error).toMatchObject({ code: 'IN_USE', path });
  expect(outcome.document.error.message).toContain('--qmp');
  expect([await hostBytes(path), await sha256(path)]).toEqual([blocks, content]);
  return outcome.document.error.message;
}

describe.runIf(runnable)('while zeros are written on ext3-format', () => {
  let mounted: Filesystem;
  let path: string;
  let writing: Spawned;
  let content: string;
  beforeAll(async () => {
    mounted = await mountFilesystem({ ...EXT3, size: GiB });
  });
  beforeEach(async () => {
    path = await pattern(`${mounted.path}/disk.raw`);
    content = await sha256(path);
    const args = ['allocate', path, '--speed', '8M', '--progress', 'json', '--json'];
    writing = await startAllocation(spawnCli(args));
    return async () => {
      writing.kill('SIGKILL');
      await writing.exit;
    };
  });
  afterAll(() => mounted.dispose());

  it('the locks are those of QEMU’s protocol, and are dropped at the end', async () => {
    expect(await lockedBytes(path)).toEqual([100, 101, 201, 203]);
    writing.kill('SIGINT');
    expect((await writing.exit).status).toBe(130);
    expect(await lockedBytes(path)).toEqual([]);
    expect((await openForWriting(path)).status).toBe(0);
  });

  it('qemu-img convert refuses the file', async () => {
    const { status, stderr } = await run('qemu-img', ['convert', '-f', 'raw', path, scratchPath('copy.raw')]);
    expect(status).not.toBe(0);
    expect(stderr).toMatch(/lock/);
    expect(writing.child.exitCode).toBeNull();
  });

  it.each(['guest', 'daemon'] as const)('a QEMU (%s) fails to get its lock on it', async (kind) => {
    await expect(startQemu({ file: path, kind })).rejects.toThrow(/lock/);
    expect(writing.child.exitCode).toBeNull();
    writing.kill('SIGINT');
    expect((await writing.exit).status).toBe(130);
    await using qemu = await startQemu({ file: path, kind });
    expect(qemu.pid).toBeGreaterThan(0);
  });

  it('a second thicken is refused, and the first one is not disturbed', async () => {
    const outcome = await cliJson<Refusal>(['allocate', path]);
    expect(outcome.status).toBe(4);
    expectOneLine(outcome, 'IN_USE');
    expect(outcome.document.error.message).toContain(String(writing.pid));
    expect(writing.child.exitCode).toBeNull();
    writing.kill('SIGINT');
    expect((await writing.exit).status).toBe(130);
    expect(await allocate(path)).toMatchObject({ verified: true });
    expect(await missing(path, 'full')).toEqual([]);
    expect(await sha256(path)).toBe(content);
  });

  it('map, info and verify work beside it', async () => {
    expect((await cliJson(['map', path])).status).toBe(0);
    expect((await cliJson(['verify', path])).status).toBe(3);
    const info = await cliJson<ImageInfo>(['info', path]);
    expect(info.document.inUse).toMatchObject({ locks: [100, 101, 201, 203] });
    expect(info.document.inUse?.by).toContain(String(writing.pid));
  });

  it('a kill -9 leaves no lock behind', async () => {
    writing.kill('SIGKILL');
    await writing.exit;
    expect(await lockedBytes(path)).toEqual([]);
    expect((await openForWriting(path)).status).toBe(0);
  });
});

describe.runIf(runnable)('zeros are not written', () => {
  let mounted: Filesystem;
  beforeAll(async () => {
    mounted = await mountFilesystem({ ...EXT3, size: GiB });
  });
  afterAll(() => mounted.dispose());

  it.each(['guest', 'daemon'] as const)('into an image that a running QEMU (%s) has open', async (kind) => {
    const path = await pattern(`${mounted.path}/${kind}.raw`);
    await using qemu = await startQemu({ file: path, kind });
    expect(await expectRefused(path)).toContain(String(qemu.pid));
    expect(await expectRefused(path, '--preallocation', 'full')).toContain(String(qemu.pid));
    await expectRefused(path, '--exclusive');
    await qemu.dispose();
    expect(await allocate(path)).toMatchObject({ verified: true });
  });

  it('into an image that a loop device lies on', async () => {
    const path = await pattern(`${mounted.path}/loop.raw`);
    await using loop = await attachLoop({ file: path });
    expect(await expectRefused(path)).toContain(loop.device);
    await loop.dispose();
    expect(await allocate(path)).toMatchObject({ verified: true });
  });

  it('into an image that a process has open for writing without any lock', async () => {
    const path = await pattern(`${mounted.path}/writer.raw`);
    await using writer = await holdOpen(path);
    expect(await expectRefused(path)).toContain(String(writer.pid));
    await writer.dispose();
    expect(await allocate(path)).toMatchObject({ verified: true });
  });

  it('but into one that a process only reads', async () => {
    const path = await pattern(`${mounted.path}/reader.raw`);
    await using _reader = await holdOpen(path, '<');
    expect(await allocate(path)).toMatchObject({ verified: true });
  });
});

describe.runIf(runnable)('blocks are reserved beside writers', () => {
  // The scratch folder's file system has fallocate; xfs is brought along.
  let mounted: Filesystem;
  beforeAll(async () => {
    mounted = await mountFilesystem({ ...XFS, size: GiB });
  });
  afterAll(() => mounted.dispose());

  it.each(['guest', 'daemon'] as const)('of a running QEMU (%s); full is refused', async (kind) => {
    for (const folder of [scratchPath('ext4'), mounted.path]) {
      const path = await pattern(`${folder}-${kind}.raw`.replace('.mnt-', '.mnt/'));
      const content = await sha256(path);
      await using _qemu = await startQemu({ file: path, kind });
      await expectRefused(path, '--preallocation', 'full');
      await expectRefused(path, '--route', 'zero-write');
      expect(await allocate(path)).toMatchObject({ verified: true, guarantee: true });
      expect(await missing(path, 'falloc')).toEqual([]);
      expect(await sha256(path)).toBe(content);
    }
  });

  it('of a loop device; full is refused', async () => {
    const path = await pattern(scratchPath('loop.raw'));
    await using _loop = await attachLoop({ file: path });
    await expectRefused(path, '--preallocation', 'full');
    expect(await allocate(path)).toMatchObject({ verified: true, guarantee: true });
    expect(await missing(path, 'falloc')).toEqual([]);
  });

  it('and every write of theirs stays', async () => {
    const path = await pattern(scratchPath('written.raw'));
    const block = randomBytes(1)[0]! | 1;
    await using qemu = await startQemu({ file: path });
    await using run = spawnCli(['allocate', path, '--speed', '64M', '--json', '--progress', 'json']);
    for (let i = 0; i < 90; i += 3) {
      await mustRun('qemu-io', ['-f', 'raw', '-c', `write -P ${block} ${i}M 1M`, qemu.nbd!]);
    }
    expect((await run.exit).status).toBe(0);
    const reads = Array.from({ length: 30 }, (_, i) => ['-c', `read -P ${block} ${i * 3}M 1M`]).flat();
    const text = await mustRun('qemu-io', ['-f', 'raw', ...reads, qemu.nbd!]);
    expect(text).not.toMatch(/verification failed/);
    expect(await missing(path, 'falloc')).toEqual([]);
  });
});
