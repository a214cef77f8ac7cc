import { chmodSync } from 'node:fs';
import { open as openFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { check, CLEAN, qemuImg, qemuIo } from '../native/qcow2-tool.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { attachLoop } from '../support/loop.js';
import { makePattern, sha256 } from '../support/patterns.js';
import { giveTo, POWER_TOOLS, POWERS, publicCli, runAs, startAs, type Power } from '../support/powers.js';
import { mustRun, repository, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import {
  BTRFS,
  EXT3,
  expectContract,
  KiB,
  makeSparse,
  MiB,
  missing,
  mixedSegments,
  TMPFS,
  TOOLS,
  XFS,
  type Storage,
} from './helpers.js';

const runnable = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, ...POWER_TOOLS, 'mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs', 'qemu-io', 'strace'],
});

function command(...args: string[]): string[] {
  return [publicCli(), 'allocate', ...args, '--json', '--progress', 'json'];
}

async function allocate(power: Power, ...args: string[]): Promise<AllocationResult> {
  const { status, stdout, stderr } = await runAs(power, process.execPath, command(...args));
  expect(status, stderr).toBe(0);
  const result = JSON.parse(stdout) as AllocationResult;
  expectContract(result);
  return result;
}

async function expectFull(power: Power, path: string, verified: boolean | null = true): Promise<AllocationResult> {
  giveTo(power, path);
  const content = await sha256(path);
  const result = await allocate(power, path, '--preallocation', 'full');
  expect(result.verified).toBe(verified);
  expect(await missing(path, 'full')).toEqual([]);
  expect(await sha256(path)).toBe(content);
  return result;
}

describe.runIf(runnable).each(POWERS)('by $name', (power) => {
  it('a raw file with holes is allocated in full', async () => {
    const path = scratchPath('disk.raw');
    await makePattern(path, mixedSegments());
    expect((await expectFull(power, path)).plan.map(({ route }) => route)).toContain('zero-write');
  });

  it.each(['falloc', 'full'])('a qcow2 image is allocated at %s', async (level) => {
    const path = scratchPath('disk.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', path, '64M');
    await qemuIo(path, ['write -P 9 1M 3M']);
    giveTo(power, path);
    expect(await allocate(power, path, '--preallocation', level)).toMatchObject({ verified: true });
    expect(await check(path)).toEqual(CLEAN);
    await qemuIo(path, ['read -P 0 0 1M', 'read -P 9 1M 3M', 'read -P 0 4M 60M']);
  });

  it('a file is allocated beside a loop device that only reads it', async () => {
    const path = makeSparse(scratchPath('disk.raw'), 16 * MiB);
    await using _loop = await attachLoop({ file: path, readOnly: true });
    await expectFull(power, path);
  });

  it('a file is allocated to its end though readers and writers come that leave again', async () => {
    const path = makeSparse(scratchPath('disk.raw'), 64 * MiB);
    giveTo(power, path);
    await using run = startAs(power, process.execPath, command(path, '--preallocation', 'full', '--speed', '64M'));
    await run.output('stderr', /"position":[1-9]/);
    await mustRun('head', ['-c', '4096', path]);
    await mustRun('sh', ['-c', `printf x | dd of=${path} bs=1 seek=${64 * MiB - 1} conv=notrunc`]);
    await mustRun('head', ['-c', '4096', path]);
    const { status, stderr } = await run.exit;
    expect(status, stderr).toBe(0);
    expect(await mustRun('tail', ['-c', '1', path])).toBe('x');
  });

  const storages: Storage[] = [EXT3, XFS, BTRFS, TMPFS];
  describe.each(storages)('on $name', (storage) => {
    let mounted: Filesystem;
    beforeAll(async () => {
      mounted = await mountFilesystem(storage);
      chmodSync(mounted.path, 0o777);
    });
    afterAll(() => mounted.dispose());

    it('zeros are written', async () => {
      const path = join(mounted.path, 'disk.raw');
      await makePattern(path, mixedSegments({ reserve: storage !== EXT3 }));
      await expectFull(power, path);
    });
  });

  // Until the lease is probed, that one finds the writer; then the proof must; then the gate.
  it.each([0, 100, 200, 300, 400, 600, 800, 1_200, 2_000, 4_000, 20_000, 200_000])(
    'who opens the file %i µs after the locks were taken is found, and keeps what they wrote',
    (delay) => expectFound(power, delay),
  );

  // The gate’s opens end late: whoever comes then is merged with them where inotify is all that there is.
  it('who opens the file while thicken’s own opens are under way is found', async () => {
    const ways = Array.from({ length: 64 }, (_, fd) => ['-P', `/proc/self/fd/${fd}`]).flat();
    const slowly = ['strace', '-f', '-qq', '-o', '/dev/null', ...ways, '-e', 'inject=openat:delay_exit=300000'];
    const [first, ...rest] = [...slowly, ...power.by] as [string, ...string[]];
    await expectFound({ ...power, by: [first, ...rest] }, 150_000);
  });

  // 40 ms each: the last lock, four probes, the lease’s signal and the lease; its end is the moment.
  it('who opens the file between the lease and thicken’s own opens is found', async () => {
    const slowly = ['strace', '-f', '-qq', '-o', '/dev/null', '-e', 'trace=fcntl', '-e', 'inject=fcntl:delay_exit=40000'];
    const [first, ...rest] = [...slowly, ...power.by] as [string, ...string[]];
    await expectFound({ ...power, by: [first, ...rest] }, 300_000);
  });
});

/** Somebody opens a file `delay` µs after a run has taken its locks. */
async function expectFound(power: Power, delay: number): Promise<void> {
  const path = makeSparse(scratchPath('disk.raw'), 64 * MiB);
  giveTo(power, path);
  const script = join(repository, 'test/support/opener.py');
  await using opener = start('python3', [script, path, String(delay)]);
  await opener.output('stdout', /ready/);
  await using run = startAs(power, process.execPath, command(path, '--preallocation', 'full', '--speed', '32M'));
  const { status, stderr } = await run.exit;
  expect(opener.stdout()).toContain('opened');
  expect(status, stderr).toBe(4);
  expect(stderr).toContain('"IN_USE"');
  await expectLastBlock(path, 0x5a);
}

async function expectLastBlock(path: string, byte: number): Promise<void> {
  await using file = await openFile(path);
  const { size } = await file.stat();
  const { buffer } = await file.read(Buffer.alloc(4 * KiB), 0, 4 * KiB, size - 4 * KiB);
  expect(buffer.equals(Buffer.alloc(4 * KiB, byte))).toBe(true);
}

describe.runIf(runnable).each(POWERS.filter(({ nobody }) => !nobody))('by $name', (power) => {
  it('a block device is allocated, where it may be opened', async () => {
    const file = makeSparse(scratchPath('disk.raw'), 32 * MiB);
    await using loop = await attachLoop({ file });
    const result = await allocate(power, loop.device, '--preallocation', 'full');
    expect(result.verified).toBe(true);
    expect(await missing(file, 'full')).toEqual([]);
  });
});
