import { copyFileSync, mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { beforeAll, describe, expect, it } from 'vitest';
import { mustRun, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { create, generator, make, type Case } from './qcow2-cases.js';
import {
  ask,
  buildTool,
  check,
  CLEAN,
  contentOf,
  KiB,
  MiB,
  must,
  qemuImg,
  qemuIo,
  sameContent,
  soak,
  type Level,
} from './qcow2-tool.js';

const able = requires({ tools: ['cmake', 'g++', 'qemu-img', 'qemu-io', 'cmp', 'flock'] });
const seed = Number(process.env.THICKEN_SEED ?? 4711);
const samples = soak ? 2000 : 40;
const judged = soak ? 150 : 8;
const kills = soak ? 300 : 12;

const base = { clusterSize: 512, version: 3, refcountBits: 16, extended: false, snapshots: 0 } as const;
const crashes: (Omit<Case, 'name'> & { size: number; level: Level; tail?: number; piece?: number })[] = [
  { ...base, fill: 'random', size: MiB, level: 'falloc' },
  { ...base, fill: 'zeros', size: MiB + 100 * 512, level: 'metadata', tail: 300, piece: 300_000 },
  { ...base, fill: 'random', refcountBits: 64, size: 3 * MiB, level: 'falloc' },
  // Zeros with storage that becomes data, their own and a snapshot's, and counts for all that moves later.
  { ...base, fill: 'zeros', refcountBits: 64, snapshots: 2, size: 2 * MiB, level: 'falloc', piece: 300_000 },
  { ...base, fill: 'random', refcountBits: 64, snapshots: 1, size: 3 * MiB, level: 'falloc', tail: 100 },
  { ...base, fill: 'discards', snapshots: 2, size: MiB, level: 'full', piece: 200_000 },
  { ...base, fill: 'compressed', snapshots: 2, size: MiB, level: 'falloc', tail: 10 },
  { ...base, fill: 'random', version: 2, snapshots: 2, size: MiB, level: 'falloc', tail: 100 },
  { ...base, fill: 'zeros', clusterSize: 16 * KiB, extended: true, snapshots: 2, size: 4 * MiB, level: 'full', tail: 9 },
  { ...base, fill: 'discards', clusterSize: 64 * KiB, refcountBits: 1, size: 8 * MiB, level: 'falloc', tail: 3 },
];

async function states(folder: string, reference: string[]): Promise<number> {
  const files = readdirSync(folder).filter((name) => name.endsWith('.qcow2'));
  for (const name of files) {
    const file = join(folder, name);
    const report = await check(file);
    expect(report, file).toMatchObject({ corruptions: 0, 'check-errors': 0 });
    if (name.includes('completed')) expect(report, file).toEqual(CLEAN);
    await sameContent(reference, await contentOf(file, 'state'));
  }
  return files.length;
}

describe.runIf(able)('a crash at any moment of a qcow2 allocation', { timeout: 1_800_000 }, () => {
  let tool: string;

  beforeAll(async () => {
    tool = await buildTool('release');
  }, 600_000);

  it.each(crashes)('is harmless: $fill, cluster $clusterSize, v$version, $snapshots snapshots, $level', async (one) => {
    const file = scratchPath('image.qcow2');
    await make(file, { ...one, name: '' }, seed + crashes.indexOf(one), one.size);
    const folder = `${file}.states`;
    mkdirSync(folder);
    const options = { level: one.level, tail: one.tail, piece: one.piece, samples, seed, folder };
    const syncs = 4;
    const every = Math.max(1, Math.floor((syncs * samples) / judged));
    const answer = await ask(tool, 'crash', file, { ...options, every });
    expect(answer.failure).toBe('');
    expect(answer.states).toBeGreaterThan(syncs * samples * 0.7);
    expect(answer.leaking).toBeGreaterThan(0);
    expect(await states(folder, await contentOf(file, 'before'))).toBeGreaterThan(judged / 2);
    await mustRun('rm', ['-r', folder]);
  });

  it('is harmless with an external data file full of old bytes', async () => {
    const file = scratchPath('image.qcow2');
    const data = `${file}.data`;
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${data}`, file, String(4 * MiB));
    await qemuIo(file, ['write -P 7 100k 300k', 'write -z 1M 500k', 'write -P 8 3M 100k']);
    for (const level of ['metadata', 'full']) {
      const answer = await ask(tool, 'crash', file, { data, level, samples, seed });
      expect(answer.failure).toBe('');
      expect(answer.states).toBeGreaterThan(samples);
    }
  });

  it(`is harmless ${kills} times by kill -9`, async () => {
    const file = scratchPath('image.qcow2');
    await create(file, { ...base, clusterSize: 4 * KiB }, 2048 * MiB);
    await qemuIo(file, ['write -P 7 100M 3M', 'write -z 600M 5M', 'write -P 8 1999M 100k']);
    const original = `${file}.original`;
    const next = generator(seed);
    copyFileSync(file, original);
    let met = 0;
    for (let i = 0; i < kills; i++) {
      // Begun anew now and then: a run that has been completed has nothing left to interrupt.
      if (i % 4 === 0) copyFileSync(original, file);
      const child = start(tool, ['allocate', file, 'level=metadata', `piece=${MiB * (1 + next(8))}`]);
      await sleep(next(250));
      child.kill('SIGKILL');
      const { signal } = await child.exit;
      if (signal === 'SIGKILL') met++;
      expect(await check(file)).toMatchObject({ corruptions: 0, 'check-errors': 0 });
      if (i % 4 === 3) await qemuImg('compare', original, file);
    }
    expect(met).toBeGreaterThan(kills / 4);
    await must(tool, 'allocate', file, { level: 'metadata' });
    expect(await check(file)).toEqual(CLEAN);
    await qemuImg('compare', original, file);
  });
});
