/** Runs on a guest's disk that are limited, paused, watched and cut short. */
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { open, ThickenError, type Image, type Job } from '../../lib/index.js';
import type { AllocationRequest, Progress } from '../../lib/types.js';
import { makePattern } from '../support/patterns.js';
import { spawnCli, type Spawned } from '../support/processes.js';
import { expectNear } from '../support/rates.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import {
  allocate,
  atMonitor,
  copyOf,
  diskArgs,
  expectAlone,
  expectChecked,
  expectContent,
  expectNothingLeft,
  MiB,
  overlayOf,
  ownRanges,
  soak,
  startMachine,
  withQemu,
  type Machine,
  type Refusal,
} from './helpers.js';

const SIZE = 64 * MiB;

interface Subject extends AsyncDisposable {
  machine: Machine;
  file: string;
  template: string;
  image: Image;
}

/** An overlay over a template full of data, in a QEMU, opened. */
async function subject(size = SIZE): Promise<Subject> {
  const template = scratchPath('template.raw');
  await makePattern(template, [{ kind: 'data', length: size }]);
  const file = await overlayOf(template);
  const machine = await startMachine(diskArgs('disk', 'qcow2', file));
  const image = await open({ qmp: machine.qmp, device: 'disk' });
  const dispose = async (): Promise<void> => {
    await image.close();
    await machine[Symbol.asyncDispose]();
  };
  return { machine, file, template, image, [Symbol.asyncDispose]: dispose };
}

async function finished({ machine, file, template, image }: Subject): Promise<void> {
  await image.close();
  await machine.quit();
  await expectChecked(file, 'qcow2');
  await expectAlone(file, 'qcow2', template);
}

function moved(job: Job, by = 1): Promise<unknown> {
  const from = job.progress().position;
  return waitFor('the job to move', () => job.progress().position >= from + by, { timeout: 60_000 });
}

/** Bytes a second over a stretch of time, by the job's own count. */
async function rateOver(job: Job, ms: number): Promise<number> {
  const [from, began] = [job.progress().position, performance.now()];
  await sleep(ms);
  return ((job.progress().position - from) / (performance.now() - began)) * 1000;
}

async function expectNearAndTell(speed: number, tolerance: number, measure: () => Promise<number>): Promise<void> {
  const reached = await expectNear(speed, tolerance, measure);
  process.stderr.write(`${(speed / MiB).toFixed(0)} MiB/s: reached ${(reached * 100).toFixed(1)}%\n`);
}

describe.runIf(withQemu)('a limit of a populate', () => {
  it('holds by 5%', async () => {
    const speed = soak ? 50 * MiB : 25 * MiB;
    await expectNearAndTell(speed, 0.05, async () => {
      await using run = await subject(soak ? 512 * MiB : 96 * MiB);
      const job = run.image.allocate({ speed });
      await moved(job);
      const rate = await rateOver(job, soak ? 8000 : 2500);
      job.setSpeed(Infinity);
      expect(await job.result).toMatchObject({ verified: true });
      await finished(run);
      return rate;
    });
  });

  it('is changed while it runs, up and down', async () => {
    await using run = await subject(256 * MiB);
    const job = run.image.allocate({ speed: 20 * MiB });
    await moved(job);
    for (const speed of [8 * MiB, 40 * MiB, 16 * MiB]) {
      await expectNearAndTell(speed, soak ? 0.05 : 0.25, async () => {
        job.setSpeed(speed);
        await sleep(200);
        return rateOver(job, soak ? 3000 : 1000);
      });
    }
    job.setSpeed(Infinity);
    expect(await job.result).toMatchObject({ allocated: 256 * MiB, verified: true });
    await finished(run);
  });

  it('of requests a second holds, too', async () => {
    await using run = await subject(16 * MiB);
    const job = run.image.allocate({ iops: 20 });
    await moved(job);
    const { position } = job.progress();
    await sleep(1000);
    // A request is at most 4 MiB, and one chunk is one.
    expect(job.progress().position - position).toBeLessThanOrEqual(22 * 4 * MiB);
    job.setIops(Infinity);
    await job.result;
    await finished(run);
  });
});

/** Forces the order of positions, and that what is left only shrinks. */
function watched(job: Job): Progress[] {
  const seen: Progress[] = [];
  job.on('progress', (progress) => seen.push({ ...progress }));
  return seen;
}

function expectMonotonic(seen: readonly Progress[], total: number): void {
  expect(seen.length).toBeGreaterThan(1);
  for (let i = 1; i < seen.length; i++) {
    expect(seen[i]!.position).toBeGreaterThanOrEqual(seen[i - 1]!.position);
  }
  for (const progress of seen) expect(progress.total).toBe(total);
  expect(seen.at(-1)).toMatchObject({ position: total, total });
}

const ROUTES: AllocationRequest[] = [{ route: 'populate' }, { route: 'stream' }];

describe.runIf(withQemu).each(ROUTES)('a run by $route', (request) => {
  it('tells how far it is, in order', async () => {
    await using run = await subject();
    const job = run.image.allocate({ ...request, speed: 100 * MiB });
    const seen = watched(job);
    expect(await job.result).toMatchObject({ allocated: SIZE, verified: true });
    expectMonotonic(seen, SIZE);
    await finished(run);
  });

  it('stands still while it is paused, and goes on', async () => {
    await using run = await subject();
    const job = run.image.allocate({ ...request, speed: 8 * MiB });
    await moved(job, MiB);
    job.pause();
    expect(job.paused).toBe(true);
    await sleep(700);
    const { position } = job.progress();
    await sleep(700);
    expect(job.progress()).toMatchObject({ position, paused: true });
    job.resume();
    await moved(job, MiB);
    job.setSpeed(Infinity);
    expect(await job.result).toMatchObject({ allocated: SIZE, verified: true });
    await finished(run);
  });

  it('is cancelled, also while it is paused', async () => {
    for (const paused of [false, true]) {
      await using run = await subject();
      const job = run.image.allocate({ ...request, speed: 8 * MiB });
      await moved(job, MiB);
      if (paused) job.pause();
      job.cancel();
      const error: unknown = await job.result.catch((reason: unknown) => reason);
      expect(error).toBeInstanceOf(ThickenError);
      expect(error).toMatchObject({ code: 'CANCELLED', done: { allocated: expect.any(Number) } });
      expect((error as ThickenError).done!.allocated).toBeLessThan(SIZE);
      // The same image goes on where it was.
      expect(await run.image.allocate().result).toMatchObject({ after: { allocated: SIZE }, verified: true });
      await finished(run);
    }
  });

  it('ends with its image, when that is closed', async () => {
    await using run = await subject();
    const job = run.image.allocate({ ...request, speed: 8 * MiB });
    await moved(job, MiB);
    await run.image.close();
    await expect(job.result).rejects.toMatchObject({ code: 'CANCELLED' });
    await run.machine.quit();
    await expectChecked(run.file, 'qcow2');
    await expectContent(run.file, 'qcow2', run.template);
  });
});

async function interrupted(machine: Machine, route: string, signal: NodeJS.Signals): Promise<Spawned> {
  const spawned = spawnCli([
    ...['allocate', '--qmp', machine.qmp, '--device', 'disk', '--route', route],
    ...['--speed', '8M', '--progress', 'json', '--json'],
  ]);
  await spawned.output('stderr', /"position":[1-9]/, { timeout: 60_000 });
  spawned.kill(signal);
  return spawned;
}

describe.runIf(withQemu)('a command that is interrupted', () => {
  it.each([
    ['populate', 'SIGINT'],
    ['populate', 'SIGTERM'],
    ['stream', 'SIGINT'],
  ] as const)('ends a %s on %s, and leaves nothing behind', async (route, signal) => {
    const template = scratchPath('template.raw');
    await makePattern(template, [{ kind: 'data', length: SIZE }]);
    const file = await overlayOf(template);
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const spawned = await interrupted(machine, route, signal);
    const { status, stdout } = await spawned.exit;
    expect(status).toBe(130);
    const { error, done } = JSON.parse(stdout) as Refusal;
    expect(error.code).toBe('CANCELLED');
    expect(done!.allocated).toBeGreaterThan(0);
    await expectNothingLeft(machine.qmp);
    await atMonitor(machine.qmp, async (client) => {
      const disk = (await client.execute('query-named-block-nodes', {})).find((node) => node['node-name'] === 'disk');
      expect(disk?.backing_file).toBe(template);
    });
    // Durable by now: nothing is lost with QEMU.
    process.kill(machine.pid, 'SIGKILL');
    await machine[Symbol.asyncDispose]();
    await expectContent(file, 'qcow2', before);
    const own = (await ownRanges(file, 'qcow2')).reduce((sum, [, length]) => sum + length, 0);
    if (route === 'populate') expect(own).toBeGreaterThanOrEqual(done!.allocated);
    await using second = await startMachine(diskArgs('disk', 'qcow2', file));
    expect(await allocate(second.qmp, 'disk')).toMatchObject({ after: { allocated: SIZE }, verified: true });
    await second.quit();
    await expectAlone(file, 'qcow2', before);
  });
});
