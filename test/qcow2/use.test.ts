import { closeSync, openSync, readFileSync, writeSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { open } from '../../lib/index.js';
import type { AllocationResult } from '../../lib/types.js';
import { create } from '../native/qcow2-cases.js';
import { check, CLEAN, GiB, KiB, MiB, qemuImg, qemuIo } from '../native/qcow2-tool.js';
import { cliJson, expectOneLine, startAllocation, type Refusal } from '../storage/helpers.js';
import { attachLoop } from '../support/loop.js';
import { mustRun, run, spawnCli, start, startQemu } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { allocate, expectTwoLevels, info, keepingContent, mapOf, TOOLS, verify } from './helpers.js';

const able = requires({ tools: TOOLS });
const withQemu = requires({ tools: [...TOOLS, 'qemu-storage-daemon'] });
const withLoop = requires({ root: true, loop: true, tools: TOOLS });
const base = { clusterSize: 64 * KiB, version: 3, refcountBits: 16, extended: false } as const;

async function thin(size = 64 * MiB, name = 'image.qcow2'): Promise<string> {
  const file = scratchPath(name);
  await create(file, base, size);
  await qemuIo(file, ['write -P 7 10M 3M']);
  return file;
}

/** That `allocate` refuses, and changes no byte of any file. */
async function expectRefused(file: string, code: string, args: string[] = [], others: string[] = []): Promise<Refusal> {
  const before = [file, ...others].map((path) => readFileSync(path));
  const { document, ...outcome } = await cliJson<Refusal>(['allocate', file, ...args]);
  expectOneLine(outcome, code);
  expect(outcome.status).toBe({ IN_USE: 4, FORMAT_REQUIRED: 2, USAGE: 2 }[code] ?? 1);
  expect(document.error.code).toBe(code);
  [file, ...others].forEach((path, i) => expect(readFileSync(path).equals(before[i]!)).toBe(true));
  return document;
}

describe.runIf(withQemu)('beside QEMU', () => {
  it('is refused while QEMU has the image open, and names --qmp', async () => {
    const file = await thin();
    await using qemu = await startQemu({ file, format: 'qcow2' });
    const { error } = await expectRefused(file, 'IN_USE');
    expect(error.message).toContain('--qmp');
    expect(error.message).not.toContain('falloc');
    expect((await info(file)).inUse?.locks).toContain(101);
    expect((await mapOf(file)).length).toBeGreaterThan(1);
    await qemu[Symbol.asyncDispose]();
    await keepingContent(file, () => allocate(file));
  });

  it('refuses an image that is marked as in use by lazy refcounts as in use, not as broken', async () => {
    const file = scratchPath('image.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on', file, '64M');
    const io = spawnIo(file);
    await using writer = io;
    await writer.output('stdout', /wrote 65536/);
    expect(readFileSync(file)[79]! & 1).toBe(1);
    await expectRefused(file, 'IN_USE');
  });

  function spawnIo(file: string) {
    return startShell(`{ echo "write 1M 64k"; sleep 30; } | qemu-io -f qcow2 ${file}`);
  }

  it('has QEMU refuse the image while it runs, and lets readers be', async () => {
    const file = await thin(512 * MiB);
    await keepingContent(file, async () => {
      await using spawned = spawnCli(['allocate', file, '--preallocation', 'full', '--speed', '200M', '--progress', 'json']);
      await startAllocation(spawned);
      const refused = await run('qemu-io', ['-f', 'qcow2', '-c', 'write 0 64k', file]);
      expect(refused.stderr + refused.stdout).toMatch(/lock/);
      // A reader is a disturbance: the hold is proven again, and the image read anew.
      for (let i = 0; i < 5; i++) {
        expect((await run('qemu-img', ['info', '-U', file])).status).toBe(0);
        await sleep(50);
      }
      const { status, stderr } = await spawned.exit;
      expect(status, stderr).toBe(0);
    });
    expect((await verify(file, { preallocation: 'full' })).satisfied).toBe(true);
  });

  it('ends when somebody opens the file for writing, whatever locks they heed', async () => {
    const file = await thin(512 * MiB);
    await keepingContent(file, async () => {
      await using spawned = spawnCli(['allocate', file, '--preallocation', 'full', '--speed', '100M', '--progress', 'json']);
      await startAllocation(spawned);
      const fd = openSync(file, 'r+');
      const { status, stderr } = await spawned.exit;
      closeSync(fd);
      expect(status, stderr).toBe(4);
    });
    await keepingContent(file, () => allocate(file));
  });
});

function startShell(command: string) {
  return start('sh', ['-c', command]);
}

describe.runIf(able)('formats', () => {
  it('by a probe alone are reported, and not acted on', async () => {
    const file = await thin(64 * MiB, 'disk.img');
    await expectRefused(file, 'FORMAT_REQUIRED');
    const facts = await info(file);
    expect(facts).toMatchObject({ format: 'qcow2', formatBy: 'probe', virtualSize: 64 * MiB });
    expect(facts.warnings.join()).toContain('probe');
    expect((await mapOf(file)).reduce((sum, { length }) => sum + length, 0)).toBe(64 * MiB);
    await keepingContent(file, () => allocate(file, { format: 'qcow2' }));
  });

  it('a header that a guest wrote into its raw disk does not get in the way', async () => {
    const file = scratchPath('disk.raw');
    await mustRun('sh', ['-c', `printf 'QFI\\373\\0\\0\\0\\003' > ${file} && truncate -s 1M ${file}`]);
    expect((await info(file)).format).toBe('qcow2');
    expect(await mapOf(file)).not.toEqual([]);
    await expectRefused(file, 'FORMAT_REQUIRED');
  });

  it('an option that says qcow2 of something else is refused', async () => {
    const file = scratchPath('disk.raw');
    await mustRun('truncate', ['-s', '1M', file]);
    await expectRefused(file, 'NOT_QCOW2', ['--format', 'qcow2']);
  });

  const damages: [string, number, number[], string][] = [
    ['the dirty bit', 79, [1], 'QCOW2_DIRTY'],
    ['the corrupt bit', 79, [2], 'QCOW2_CORRUPT'],
    ['an unknown feature', 72, [0x40], 'QCOW2_UNKNOWN_FEATURE'],
    ['an absurd cluster size', 20, [0, 0, 0, 40], 'QCOW2_ABSURD'],
    ['an L1 table outside the file', 40, [0, 0, 1, 0, 0, 0, 0, 0], 'QCOW2_OUTSIDE_FILE'],
    ['an L1 table that is none', 40, [0, 0, 0, 0, 0, 1, 0, 0], 'QCOW2_CORRUPT'],
    ['version 4', 7, [4], 'UNSUPPORTED'],
  ];
  it.each(damages)('%s is refused, and nothing is changed', async (_name, at, bytes, code) => {
    const file = await thin();
    const fd = openSync(file, 'r+');
    writeSync(fd, Buffer.from(bytes), 0, bytes.length, at);
    closeSync(fd);
    const { error } = await expectRefused(file, code);
    expect(error.message).toMatch(/; ./);
    expect(error.path).toBe(file);
  });

  it('a dirty image can be verified and mapped, with a warning', async () => {
    const file = await thin();
    const fd = openSync(file, 'r+');
    writeSync(fd, Buffer.from([1]), 0, 1, 79);
    closeSync(fd);
    const verdict = await verify(file);
    expect(verdict.satisfied).toBe(false);
    expect(verdict.warnings.join()).toContain('qemu-img check -r all');
    expect((await mapOf(file)).length).toBeGreaterThan(1);
  });
});

describe.runIf(able)('a backing file', () => {
  it('is not opened, and its content has to be populated first', async () => {
    const below = await thin(64 * MiB, 'base.qcow2');
    const file = scratchPath('top.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', '-b', below, '-F', 'qcow2', file);
    await qemuIo(file, ['write -P 9 0 1M', 'write -z 1M 1M']);
    const { error } = await expectRefused(file, 'NEEDS_POPULATE', [], [below]);
    expect(error).toMatchObject({ offset: 2 * MiB });
    const facts = await info(file);
    expect(facts.backing).toEqual([{ path: below, format: 'qcow2', virtualSize: null }]);
    await mustRun('mv', [below, `${below}.away`]);
    // What depends on nothing below is allocated all the same; zeros hide it.
    const result = await allocate(file, { length: 2 * MiB });
    expect(result.allocated).toBe(MiB);
    expect((await verify(file, { length: 2 * MiB })).satisfied).toBe(true);
    expect((await verify(file)).missing).toEqual([
      { offset: 2 * MiB, length: 62 * MiB, why: 'backing: the content comes from a backing file' },
    ]);
    await mustRun('mv', [`${below}.away`, below]);
    expect(await check(file)).toEqual(CLEAN);
    await qemuIo(file, ['read -P 9 0 1M', 'read -P 0 1M 1M', 'read -P 7 10M 3M']);
  });
});

describe.runIf(able)('an external data file', () => {
  async function external(options = ''): Promise<[file: string, data: string]> {
    const data = scratchPath('data.raw');
    const file = scratchPath('image.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${data}${options}`, file, '64M');
    await qemuIo(file, ['write -P 7 10M 3M', 'write -z 20M 1M']);
    return [file, data];
  }

  it('is opened only where the format is stated', async () => {
    const [file, data] = await external();
    await mustRun('mv', [data, `${data}.away`]);
    expect((await info(file)).warnings.join()).toContain('--format');
    expect((await mapOf(file)).some(({ host }) => host === 'unknown')).toBe(true);
    await expectRefused(file, 'FORMAT_REQUIRED');
    await expectRefused(file, 'ENOENT', ['--format', 'qcow2']);
    await mustRun('mv', [`${data}.away`, data]);
    await keepingContent(file, () => allocate(file, { format: 'qcow2' }));
  });

  it.each(['', ',data_file_raw=on', ',extended_l2=on'])('is allocated at its own offsets%s', async (options) => {
    const [file, data] = await external(options);
    await expectTwoLevels(file, { dataFile: data });
    const result = await keepingContent(file, () => allocate(file, { format: 'qcow2', preallocation: 'full' }));
    expect(result.guarantee).toBe(true);
    expect((await verify(file, { format: 'qcow2', preallocation: 'full' })).satisfied).toBe(true);
    expect((await mapOf(file, 'qcow2')).every(({ host, offset, start }) => host === 'written' && offset === start)).toBe(true);
  });

  it('that somebody writes to is in use', async () => {
    const [file, data] = await external();
    const fd = openSync(data, 'r+');
    await expectRefused(file, 'IN_USE', ['--format', 'qcow2'], [data]);
    closeSync(fd);
  });
});

describe.runIf(withLoop)('a block device', () => {
  it('with a qcow2 image on it is reported, and not allocated', async () => {
    const file = await thin();
    await using loop = await attachLoop({ file });
    const outcome = await cliJson<Refusal>(['allocate', loop.device, '--format', 'qcow2']);
    expect(outcome.document.error.code).toBe('UNSUPPORTED');
    expect(outcome.status).toBe(1);
    expect((await cliJson<AllocationResult>(['info', loop.device])).status).toBe(0);
  });
});

describe.runIf(able)('the end of an image', () => {
  it('waits for what is under way, and cancels it', async () => {
    const file = await thin(GiB);
    await keepingContent(file, async () => {
      const image = await open(file);
      const job = image.allocate({ preallocation: 'full' });
      const rejected = expect(job.result).rejects.toMatchObject({ code: 'CANCELLED' });
      await new Promise((resolve) => job.once('progress', resolve));
      await Promise.all([image.close(), image.close()]);
      await rejected;
    });
  });
});
