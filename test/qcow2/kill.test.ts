import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { allCases, generator, make } from '../native/qcow2-cases.js';
import { check, CLEAN, contentOf, KiB, MiB, qemuImg, sameContent, soak, type Level } from '../native/qcow2-tool.js';
import { mustRun, run, spawnCli } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratch } from '../support/scratch.js';
import { startAllocation } from '../storage/helpers.js';
import { allocate, keepingContent, TOOLS, unmapped, verify } from './helpers.js';

const able = requires({ tools: TOOLS });
const kills = soak ? 300 : 12;
const seed = Number(process.env.THICKEN_SEED ?? 4711);

const cases: { name: string; clusterSize: number; level: Level; speed: string }[] = [
  { name: 'metadata, small clusters', clusterSize: 4 * KiB, level: 'metadata', speed: '128M' },
  { name: 'falloc', clusterSize: 4 * KiB, level: 'falloc', speed: '128M' },
  { name: 'full', clusterSize: 64 * KiB, level: 'full', speed: '256M' },
];

describe.runIf(able).each(cases)('kill -9 at random moments: $name', ({ clusterSize, level, speed }) => {
  const rounds = Math.ceil(kills / cases.length);
  let pristine: string;
  let file: string;
  let content: string[];
  beforeAll(async () => {
    const folder = scratch();
    pristine = `${folder}/pristine.qcow2`;
    file = `${folder}/image.qcow2`;
    const one = allCases().find(
      (given) => given.clusterSize === clusterSize && given.refcountBits === 16 && given.version === 3 && given.snapshots === 2 && given.fill === 'random' && !given.extended,
    )!;
    await make(pristine, one, seed, 96 * MiB);
    content = await contentOf(pristine, 'pristine');
  });
  afterAll(() => mustRun('rm', ['-f', pristine, file, ...content]));

  it(
    'the image is sound, its content the same, and the next run completes',
    async () => {
      const next = generator(seed);
      let met = 0;
      await renew();
      for (let i = 0; i < rounds; i++) {
        const finished = await killedRun(next(700));
        if (!finished) met++;
        await expectSound();
        // Half of the runs go on where the one before was killed.
        if (!finished && i % 2 === 0) continue;
        await complete();
        await renew();
      }
      expect(met).toBeGreaterThan(rounds / 3);
      await complete();
    },
    kills * 10_000 + 60_000,
  );

  async function renew(): Promise<void> {
    await mustRun('cp', ['--sparse=always', pristine, file]);
  }

  async function killedRun(afterMs: number): Promise<boolean> {
    await using spawned = spawnCli(['allocate', file, '--preallocation', level, '--speed', speed]);
    await sleep(150 + afterMs);
    spawned.kill('SIGKILL');
    const { signal, status, stderr } = await spawned.exit;
    if (signal === 'SIGKILL') return false;
    expect(status, stderr).toBe(0);
    return true;
  }

  async function expectSound(): Promise<void> {
    expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
    const now = await contentOf(file, 'now');
    await sameContent(content, now);
    await mustRun('rm', ['-f', ...now]);
    const { status, stderr } = await run('qemu-io', ['-f', 'qcow2', '-c', 'flush', file]);
    expect(status, stderr).toBe(0);
  }

  async function complete(): Promise<void> {
    await allocate(file, { preallocation: level });
    expect(await check(file)).toEqual(CLEAN);
    expect(await unmapped(file)).toEqual([]);
    expect((await verify(file, { preallocation: level })).satisfied).toBe(true);
    const now = await contentOf(file, 'now');
    await sameContent(content, now);
    await mustRun('rm', ['-f', ...now]);
  }
});

describe.runIf(able)('SIGINT', () => {
  it.each(['metadata', 'falloc', 'full'] as Level[])('at %s ends with 130, and the next run completes', async (level) => {
    const file = `${scratch()}/image.qcow2`;
    await qemuImg('create', '-q', '-f', 'qcow2', file, '512M');
    await mustRun('qemu-io', ['-f', 'qcow2', '-c', 'write -P 7 10M 3M', file]);
    await keepingContent(file, async () => {
      await using spawned = spawnCli(['allocate', file, '--preallocation', level, '--speed', '64M', '--progress', 'json', '--json']);
      await startAllocation(spawned);
      spawned.kill('SIGINT');
      const { status, stdout } = await spawned.exit;
      expect(status).toBe(130);
      const { error, done } = JSON.parse(stdout) as { error: { code: string }; done: { allocated: number } };
      expect(error.code).toBe('CANCELLED');
      expect(done.allocated).toBeGreaterThan(0);
      expect(await check(file)).toEqual(CLEAN);
      const result = await allocate(file, { preallocation: level });
      expect(result.skipped).toBeGreaterThanOrEqual(3 * MiB);
    });
    expect((await verify(file, { preallocation: level })).satisfied).toBe(true);
  });
});
