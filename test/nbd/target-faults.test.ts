/** What goes wrong on the way to an export's server, and behind it. */
import { writeFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { EXT4, makeSparse, missing, soak, startAllocation, type Refusal } from '../storage/helpers.js';
import { mountFilesystem } from '../support/filesystems.js';
import { random } from '../support/patterns.js';
import { mustRun, spawnCli, type Outcome, type Spawned } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { nbdkit, qemuNbd } from './servers.js';
import { allocateExport, expectSame, imageOf, MiB, refusalOf, SIZE } from './targets.js';

const TOOLS = ['qemu-img', 'qemu-nbd', 'nbdkit', 'nbdinfo', 'filefrag', 'cp', 'sync'];
const runnable = requires({ tools: TOOLS });
const kills = soak ? 100 : 8;

/** A run that takes a few seconds. */
function startFull(uri: string, speed = '3M'): Spawned {
  const level = ['--preallocation', 'full', '--exclusive'];
  return spawnCli(['allocate', uri, ...level, '--speed', speed, '--progress', 'json', '--json']);
}

function refusal({ stdout }: Outcome): Refusal {
  return JSON.parse(stdout) as Refusal;
}

describe.runIf(runnable)('a server', () => {
  test('that is killed ends the run; the next one completes', async () => {
    const { path, copy } = await imageOf('raw');
    const server = await qemuNbd(path, 'raw');
    await using run = await startAllocation(startFull(server.uri));
    server.process.kill('SIGKILL');
    const outcome = await run.exit;
    expect(outcome.status, outcome.stderr).toBe(1);
    const { error, done } = refusal(outcome);
    expect(error.code).toBe('NBD_LOST');
    expect(done!.allocated).toBeGreaterThan(0);
    await expectSame(path, 'raw', copy);
    expect(await missing(path, 'full')).not.toEqual([]);
    await using again = await qemuNbd(path, 'raw');
    expect(await allocateExport(again.uri, '--preallocation', 'full')).toMatchObject({ verified: true });
    expect(await missing(path, 'full')).toEqual([]);
    await expectSame(path, 'raw', copy);
  });

  test.each([
    ['full', ['error-pwrite=EIO', 'error-pwrite-rate=100%'], 'EIO', 'WRITE'],
    ['falloc', ['error-zero=EIO', 'error-zero-rate=100%'], 'EIO', 'WRITE_ZEROES'],
    ['full', ['error-pread=EIO', 'error-pread-rate=100%'], 'EIO', 'READ'],
    ['full', ['error-pwrite=ENOSPC', 'error-pwrite-rate=100%'], 'ENOSPC', 'WRITE'],
    ['full', ['error-extents=EIO', 'error-extents-rate=100%'], 'EIO', 'BLOCK_STATUS'],
  ])('that fails, %s with %j, is told of', async (level, parameters, code, call) => {
    const { path, copy } = await imageOf('raw');
    const trigger = scratchPath('trigger');
    await using server = await nbdkit(['file', path, ...parameters, `error-file=${trigger}`], ['--filter=error']);
    writeFileSync(trigger, '');
    const { error } = await refusalOf(['allocate', '--exclusive', '--preallocation', level, server.uri], 1);
    expect(error).toMatchObject({ code, message: expect.stringContaining(`${call} failed with ${code}`) });
    await expectSame(path, 'raw', copy);
  });

  test('that hangs on its map: SIGINT ends the run', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await nbdkit(['file', path, 'delay-extents=600'], ['--filter=delay']);
    await using run = spawnCli(['allocate', '--exclusive', '--json', server.uri]);
    await sleep(1_000);
    expect(run.child.exitCode).toBe(null);
    run.kill('SIGINT');
    const outcome = await run.exit;
    expect(outcome.status, outcome.stderr).toBe(130);
    expect(refusal(outcome)).toMatchObject({ error: { code: 'CANCELLED' }, done: { allocated: 0 } });
    await expectSame(path, 'raw', copy);
  });

  test('that is slow is waited for, and SIGTERM ends the run after what is in flight', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await nbdkit(['file', path, 'delay-read=200ms', 'delay-write=200ms'], ['--filter=delay']);
    await using run = await startAllocation(startFull(server.uri, '8M'));
    run.kill('SIGTERM');
    const outcome = await run.exit;
    expect(outcome.status, outcome.stderr).toBe(130);
    expect(refusal(outcome)).toMatchObject({ error: { code: 'CANCELLED' }, done: { effective: { offset: 0, length: SIZE } } });
    await expectSame(path, 'raw', copy);
  });
});

describe.runIf(runnable && requires({ root: true, loop: true, tools: ['mkfs.ext4', 'mount'] }))('a server’s file system', () => {
  test.each([
    ['falloc', 'nbdkit'],
    ['full', 'nbdkit'],
    ['full', 'qemu-nbd'],
  ])('that is full ends the run (%s, %s)', async (level, kind) => {
    await using mounted = await mountFilesystem({ ...EXT4, size: 64 * MiB });
    const path = makeSparse(`${mounted.path}/disk.raw`, 200 * MiB);
    await using server = kind === 'nbdkit' ? await nbdkit(['file', path]) : await qemuNbd(path, 'raw');
    const { error, done } = await refusalOf(['allocate', '--exclusive', '--preallocation', level, server.uri], 1);
    expect(error).toMatchObject({ code: 'ENOSPC', message: expect.stringMatching(/failed with ENOSPC.*server’s side/) });
    expect(done!.allocated).toBeGreaterThan(MiB);
    expect(error.needed).toBeGreaterThan(0);
    await server[Symbol.asyncDispose]();
    await expectSame(path, 'raw', makeSparse(scratchPath('zeros'), 200 * MiB));
  });
});

describe.runIf(runnable)('kill -9 of thicken', () => {
  test('leaves the content as it was, and the next run completes', { timeout: kills * 20_000 }, async () => {
    const next = random(23);
    let met = 0;
    for (let i = 0; i < kills; i++) {
      const format = i % 2 ? 'raw' : 'qcow2';
      const { path, copy } = await imageOf(format);
      await using server = await qemuNbd(path, format);
      await using run = await startAllocation(startFull(server.uri));
      await sleep(next() % 1500);
      run.kill('SIGKILL');
      if ((await run.exit).signal === 'SIGKILL') met++;
      const result: AllocationResult = await allocateExport(server.uri, '--preallocation', 'full');
      expect(result.verified).toBe(true);
      expect(server.process.child.exitCode).toBeNull();
      await server[Symbol.asyncDispose]();
      await expectSame(path, format, copy);
      if (format === 'qcow2') await mustRun('qemu-img', ['check', '-q', path]);
      else expect(await missing(path, 'full')).toEqual([]);
    }
    expect(met).toBeGreaterThan(kills / 2);
  });
});
