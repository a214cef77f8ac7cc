import { afterEach, describe, expect, it } from 'vitest';
import { setTimeout as sleep } from 'node:timers/promises';
import { open, ThickenError, type Image, type Job } from '../../lib/index.js';
import type { AllocationRequest, AllocationResult } from '../../lib/types.js';
import { mountFilesystem } from '../support/filesystems.js';
import { hostBytes } from '../support/judges.js';
import { attachLoop } from '../support/loop.js';
import { makePattern, sha256, sparseChecksum, type Segment } from '../support/patterns.js';
import { mustRun, spawnCli } from '../support/processes.js';
import { expectNear } from '../support/rates.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import {
  allocate,
  EXT3,
  GiB,
  KiB,
  makeSparse,
  MiB,
  missing,
  soak,
  startAllocation,
  TOOLS,
  type Refusal,
} from './helpers.js';

const runnable = requires({ tools: TOOLS });
const withLoop = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4'] });

let image: Image | undefined;
let job: Job | undefined;
afterEach(async () => {
  await image?.close();
});

async function begin(path: string, request: AllocationRequest & { signal?: AbortSignal }): Promise<Job> {
  image = await open(path);
  job = image.allocate(request);
  return job;
}

/** Bytes a second over a stretch of time, by the job's own count. */
async function rateOver(running: Job, ms: number): Promise<number> {
  const [from, began] = [running.progress().position, performance.now()];
  await sleep(ms);
  return ((running.progress().position - from) / (performance.now() - began)) * 1000;
}

async function moving(running: Job): Promise<void> {
  await waitFor('the job to move', () => running.progress().position > 0);
}

/** Only the long run has the machine to itself. */
const PROMPTLY_MS = soak ? 1000 : 10_000;

describe.runIf(runnable)('a limit of bytes a second', () => {
  const size = soak ? GiB : 192 * MiB;

  it('holds 50 MiB/s over a run of level full, by 5%', async () => {
    await expectNear(50 * MiB, 0.05, async () => {
      const path = makeSparse(scratchPath('full.raw'), size);
      const result = await allocate(path, '--preallocation', 'full', '--speed', '50M');
      expect(await missing(path, 'full')).toEqual([]);
      return size / result.seconds;
    });
  });

  it('holds for holes that are small, and reserved ones', async () => {
    for (const preallocation of ['full', 'falloc'] as const) {
      await expectNear(40 * MiB, 0.08, async () => {
        const path = scratchPath('small.raw');
        const pair: Segment[] = [
          { kind: 'hole', length: 192 * KiB },
          { kind: 'data', length: 64 * KiB },
        ];
        await makePattern(path, Array.from({ length: 400 }, () => pair).flat());
        const result = await allocate(path, '--preallocation', preallocation, '--speed', '40M');
        return (75 * MiB) / result.seconds;
      });
    }
  });

  it('takes effect within 200 ms when it is changed, up and down', async () => {
    const path = makeSparse(scratchPath('changed.raw'), GiB);
    const running = await begin(path, { preallocation: 'full', speed: 40 * MiB });
    await moving(running);
    await sleep(300);
    for (const speed of [10 * MiB, 80 * MiB, 20 * MiB]) {
      await expectNear(speed, 0.2, async () => {
        running.setSpeed(speed);
        await sleep(200);
        return rateOver(running, 1000);
      });
    }
    running.setSpeed(MiB);
    await sleep(200);
    // A slow limit must not hold a fast one up: at the slow one this would take 16 s.
    const before = running.progress().position;
    running.setSpeed(100 * MiB);
    await sleep(soak ? 200 : 2000);
    expect(running.progress().position - before).toBeGreaterThan(soak ? 8 * MiB : 16 * MiB);
  });

  it('can be given to a run without one', async () => {
    const path = makeSparse(scratchPath('late.raw'), 2 * GiB);
    const running = await begin(path, { preallocation: 'full' });
    await moving(running);
    await expectNear(10 * MiB, 0.2, async () => {
      running.setSpeed(10 * MiB);
      await sleep(200);
      return rateOver(running, 1500);
    });
  });

  it.runIf(withLoop)('counts what is written to a device, and what is zeroed out', async () => {
    const file = makeSparse(scratchPath('device.raw'), 48 * MiB);
    await using loop = await attachLoop({ file });
    for (const level of ['falloc', 'full']) {
      const result = await allocate(loop.device, '--preallocation', level, '--speed', '24M');
      // The flush at the end takes the disk's time; faster than told it must never be.
      expect(result.seconds).toBeGreaterThan(1.9);
    }
  });

  it('refuses what is no rate', async () => {
    const path = makeSparse(scratchPath('none.raw'), MiB);
    image = await open(path);
    for (const speed of [0, -1, NaN]) {
      const code = image.allocate({ speed }).result.catch((error: ThickenError) => error.code);
      expect(await code).toBe('RANGE');
    }
    const running = image.allocate({ speed: 1024 });
    expect(() => running.setSpeed(0)).toThrow(RangeError);
    expect(() => running.setIops(-3)).toThrow(RangeError);
    expect(await hostBytes(path)).toBeLessThan(MiB);
  });
});

describe.runIf(runnable)('storage that is given back meanwhile', () => {
  it('is given again before the end', async () => {
    const path = makeSparse(scratchPath('discarded.raw'), 64 * MiB);
    const running = await begin(path, { speed: 32 * MiB });
    await waitFor('the first chunks', () => running.progress().position > 8 * MiB);
    await mustRun('fallocate', ['--punch-hole', '--offset', '0', '--length', String(MiB), path]);
    expect(await running.result).toMatchObject({ allocated: 64 * MiB, verified: true });
    expect(running.progress()).toMatchObject({ position: 65 * MiB, total: 65 * MiB });
    expect(await missing(path, 'falloc')).toEqual([]);
  });
});

describe.runIf(runnable)('a limit of requests a second', () => {
  it('holds', async () => {
    const path = scratchPath('iops.raw');
    const pair: Segment[] = [
      { kind: 'hole', length: 64 * KiB },
      { kind: 'data', length: 4 * KiB },
    ];
    for (const level of ['falloc', 'full']) {
      await expectNear(100, 0.1, async () => {
        await makePattern(path, Array.from({ length: 200 }, () => pair).flat());
        const result = await allocate(path, '--preallocation', level, '--iops', '100');
        return 200 / result.seconds;
      });
    }
  });
});

describe.runIf(runnable)('pause', () => {
  it.each([
    { name: 'throttled', request: { preallocation: 'full', speed: 40 * MiB } as const, most: 2 * MiB },
    { name: 'at full speed', request: { preallocation: 'full' } as const, most: 4 * 8 * MiB },
  ])('stops within the chunks in flight, and resume goes on ($name)', async ({ request, most }) => {
    const path = makeSparse(scratchPath('paused.raw'), request.speed ? 96 * MiB : 3 * GiB);
    const running = await begin(path, request);
    await moving(running);
    const at = running.progress().position;
    running.pause();
    expect(running.paused).toBe(true);
    await sleep(500);
    const stopped = running.progress();
    expect(stopped.paused).toBe(true);
    expect(stopped.position - at).toBeLessThanOrEqual(most);
    const blocks = await hostBytes(path);
    await sleep(500);
    expect(running.progress().position).toBe(stopped.position);
    expect(await hostBytes(path)).toBe(blocks);
    // It makes no difference to pause what is paused.
    running.pause();
    running.resume();
    running.setSpeed(Infinity);
    if (!request.speed) return running.cancel();
    expect(await running.result).toMatchObject({ verified: true });
  });

  it('can be ended by a cancel', async () => {
    const path = makeSparse(scratchPath('paused.raw'), 96 * MiB);
    const running = await begin(path, { preallocation: 'full', speed: 40 * MiB });
    await moving(running);
    running.pause();
    running.cancel();
    await expect(running.result).rejects.toMatchObject({ code: 'CANCELLED' });
  });

  it('before the first write holds it back', async () => {
    const path = makeSparse(scratchPath('early.raw'), 8 * MiB);
    const running = await begin(path, {});
    running.pause();
    await sleep(300);
    expect(await hostBytes(path)).toBe(0);
    running.resume();
    expect(await running.result).toMatchObject({ allocated: 8 * MiB });
  });
});

describe.runIf(runnable)('a cancelled run', () => {
  const segments: Segment[] = [
    { kind: 'data', length: MiB },
    { kind: 'hole', length: 63 * MiB },
  ];

  async function pattern(path = scratchPath('cancelled.raw')): Promise<string> {
    await makePattern(path, segments);
    return path;
  }

  it.each([
    ['SIGINT', 'full'],
    ['SIGTERM', 'full'],
    ['SIGINT', 'falloc'],
  ] as const)('by %s (%s) ends within a second, tells what was done, and is continued', async (signal, level) => {
    const path = await pattern();
    const content = await sha256(path);
    const args = ['allocate', path, '--preallocation', level, '--speed', '16M'];
    await using spawned = await startAllocation(spawnCli([...args, '--json', '--progress', 'json']));
    const began = performance.now();
    spawned.kill(signal);
    const { status, stdout } = await spawned.exit;
    expect(performance.now() - began).toBeLessThan(PROMPTLY_MS);
    expect(status).toBe(130);
    const { target, error, done } = JSON.parse(stdout) as Required<Refusal>;
    expect(target).toBe(path);
    expect(error).toMatchObject({ code: 'CANCELLED', path });
    expect(done).toMatchObject({
      requested: { offset: 0, length: 64 * MiB },
      before: { allocated: MiB },
    });
    expect(done.allocated).toBeGreaterThan(0);
    expect(done.allocated).toBeLessThan(63 * MiB);
    const result = await allocate(path, '--preallocation', level);
    expect(result).toMatchObject({
      before: { allocated: MiB + done.allocated },
      after: { allocated: 64 * MiB },
      verified: true,
    });
    expect(await sha256(path)).toBe(content);
  });

  it('says so in one line without --json', async () => {
    const path = await pattern();
    await using spawned = spawnCli(['allocate', path, '--preallocation', 'full', '--speed', '16M']);
    await waitFor('blocks', async () => (await hostBytes(path)) > 2 * MiB);
    spawned.kill('SIGINT');
    const { status, stdout, stderr } = await spawned.exit;
    expect(status).toBe(130);
    expect(stdout).toMatch(/ had been allocated by then\n$/);
    expect(stderr).toMatch(/^thicken: CANCELLED: [^\n]*\n$/);
  });

  it('of several targets tells of each', async () => {
    const paths = [await pattern(scratchPath('a.raw')), await pattern(scratchPath('b.raw'))];
    const args = ['allocate', ...paths, '--preallocation', 'full', '--speed', '16M', '--json'];
    await using spawned = await startAllocation(spawnCli([...args, '--progress', 'json']));
    spawned.kill('SIGINT');
    const { status, stdout } = await spawned.exit;
    expect(status).toBe(130);
    const documents = JSON.parse(stdout) as Refusal[];
    expect(documents.map(({ target }) => target)).toEqual(paths);
    expect(documents.map(({ error }) => error.code)).toEqual(['CANCELLED', 'CANCELLED']);
    expect(documents[0]!.done!.allocated).toBeGreaterThan(0);
  });

  it('by an AbortSignal rejects with what was done', async () => {
    const path = await pattern();
    const content = await sparseChecksum(path);
    const controller = new AbortController();
    const running = await begin(path, {
      preallocation: 'full',
      speed: 16 * MiB,
      signal: controller.signal,
    });
    await moving(running);
    const began = performance.now();
    controller.abort();
    const error = await running.result.catch((reason: unknown) => reason);
    expect(performance.now() - began).toBeLessThan(PROMPTLY_MS);
    expect(error).toBeInstanceOf(ThickenError);
    expect(error).toMatchObject({ code: 'CANCELLED', path });
    const { done } = error as ThickenError;
    expect(done!.allocated).toBeGreaterThan(0);
    expect(done!.allocated).toBeLessThan(63 * MiB);
    expect(await sparseChecksum(path)).toBe(content);
    const blocks = await hostBytes(path);
    await sleep(300);
    expect(await hostBytes(path)).toBe(blocks);
  });

  it('by a signal that was aborted before does nothing', async () => {
    const path = await pattern();
    const blocks = await hostBytes(path);
    const running = await begin(path, { preallocation: 'full', signal: AbortSignal.abort() });
    await expect(running.result).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(await hostBytes(path)).toBe(blocks);
  });

  it('by a signal after its end is no matter', async () => {
    const path = await pattern();
    const controller = new AbortController();
    const running = await begin(path, { signal: controller.signal });
    const result: AllocationResult = await running.result;
    controller.abort();
    running.cancel();
    running.pause();
    running.resume();
    expect(await running.result).toBe(result);
  });

  it.runIf(withLoop)('on ext3-format is continued, and has given its locks back', async () => {
    await using mounted = await mountFilesystem(EXT3);
    const path = await pattern(`${mounted.path}/disk.raw`);
    const content = await sha256(path);
    const running = await begin(path, { speed: 16 * MiB });
    await moving(running);
    running.cancel();
    await expect(running.result).rejects.toMatchObject({ code: 'CANCELLED' });
    await image!.close();
    expect(await allocate(path)).toMatchObject({ verified: true });
    expect(await sha256(path)).toBe(content);
  });
});

describe.runIf(runnable)('progress', () => {
  it('goes up to the total, and comes at most ten times a second', async () => {
    const path = makeSparse(scratchPath('progress.raw'), 32 * MiB);
    const running = await begin(path, { preallocation: 'full', speed: 32 * MiB });
    const positions: number[] = [];
    const began = performance.now();
    running.on('progress', ({ position, total }) => {
      expect(total).toBe(32 * MiB);
      positions.push(position);
    });
    await running.result;
    expect(positions).toEqual([...positions].sort((a, b) => a - b));
    expect(positions.at(-1)).toBe(32 * MiB);
    expect(positions.length).toBeGreaterThan(2);
    expect(positions.length).toBeLessThan(2 + (performance.now() - began) / 95);
  });

  it('is one JSON object a line on stderr', async () => {
    const path = makeSparse(scratchPath('lines.raw'), 16 * MiB);
    const args = ['allocate', path, '--preallocation', 'full', '--speed', '32M', '--progress', 'json'];
    await using spawned = spawnCli(args);
    const { status, stderr } = await spawned.exit;
    expect(status).toBe(0);
    const lines = stderr.trimEnd().split('\n').map((line) => JSON.parse(line) as { position: number });
    expect(lines.at(-1)).toMatchObject({ target: path, position: 16 * MiB, total: 16 * MiB, paused: false });
  });
});
