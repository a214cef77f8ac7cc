import { copyFileSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { qemuCompare } from '../support/judges.js';
import { makePattern, random, sparseChecksum, type Segment } from '../support/patterns.js';
import { mustRun, run, spawnCli } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { allocate, EXT3, EXT4, KiB, missing, soak, TOOLS, type Level, type Storage } from './helpers.js';

const runnable = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4', 'qemu-io', 'cp', 'e2fsck'] });
const kills = soak ? 200 : 10;
const seed = Number(process.env.THICKEN_SEED ?? 4711);

function pattern(reserve: boolean): Segment[] {
  const group: Segment[] = [
    { kind: 'hole', length: 700 * KiB },
    { kind: 'data', length: 64 * KiB },
    { kind: reserve ? 'unwritten' : 'hole', length: 260 * KiB },
    { kind: 'data', length: 4 * KiB },
  ];
  return Array.from({ length: 40 }, () => group).flat();
}

interface Case {
  name: string;
  storage: Storage;
  level: Level;
  /** Bytes a second: slow enough that most kills meet the run at work. */
  speed: string;
}

const cases: Case[] = [
  { name: 'full on ext4', storage: EXT4, level: 'full', speed: '64M' },
  { name: 'falloc on ext4', storage: EXT4, level: 'falloc', speed: '48M' },
  { name: 'zeros on ext3-format', storage: EXT3, level: 'falloc', speed: '64M' },
];

describe.runIf(runnable).each(cases)('kill -9 at random moments of $name', ({ storage, level, speed }) => {
  let mounted: Filesystem;
  let pristine: string;
  let path: string;
  beforeAll(async () => {
    mounted = await mountFilesystem(storage);
    pristine = scratchPath('pristine.raw');
    path = `${mounted.path}/disk.raw`;
    await makePattern(pristine, pattern(storage.type !== 'ext3-format'));
  });
  afterAll(() => mounted.dispose());

  it(
    'changes no data, leaves no lock, and the next run completes',
    async () => {
      const next = random(seed);
      const content = await sparseChecksum(pristine);
      let met = 0;
      await renew();
      for (let i = 0; i < kills; i++) {
        const finished = await killedRun(next() % 900);
        expect(await qemuCompare(pristine, path)).toBe(true);
        await expectUnlocked(path);
        if (!finished) met++;
        // Half of the runs go on where the one before was killed.
        if (!finished && i % 2 === 0) continue;
        const result = await allocate(path, '--preallocation', level);
        expect(result.verified).toBe(true);
        expect(await missing(path, level)).toEqual([]);
        expect(await sparseChecksum(path)).toBe(content);
        await renew();
      }
      expect(met).toBeGreaterThan(kills / 3);
      await allocate(path, '--preallocation', level);
      expect(await sparseChecksum(path)).toBe(content);
    },
    kills * 6_000 + 60_000,
  );

  it('leaves a sound file system', async () => {
    await mustRun('sync', ['-f', mounted.path]);
    // A copy as of now: the file system is still mounted.
    await mustRun('umount', [mounted.path]);
    await mustRun('e2fsck', ['-fn', mounted.device!]);
    await mustRun('mount', [mounted.device!, mounted.path]);
  });

  /** A fresh copy of the pristine file, with its holes. */
  async function renew(): Promise<void> {
    await mustRun('rm', ['-f', path]);
    await mustRun('cp', ['--sparse=always', pristine, path]);
    await mustRun('sync', ['-f', path]);
  }

  /** Whether the run was over before it was killed. */
  async function killedRun(afterMs: number): Promise<boolean> {
    await using spawned = spawnCli(['allocate', path, '--preallocation', level, '--speed', speed]);
    await sleep(100 + afterMs);
    spawned.kill('SIGKILL');
    const { signal, status, stderr } = await spawned.exit;
    if (signal === 'SIGKILL') return false;
    expect(status, stderr).toBe(0);
    return true;
  }

  async function expectUnlocked(file: string): Promise<void> {
    const { status, stderr } = await run('qemu-io', ['-f', 'raw', '-c', 'flush', file]);
    expect(status, stderr).toBe(0);
  }
});

describe.runIf(runnable)('a run that is killed while it scans', () => {
  it('has changed nothing', async () => {
    const path = scratchPath('scan.raw');
    await makePattern(path, pattern(true));
    const copy = scratchPath('scan-copy.raw');
    copyFileSync(path, copy);
    for (const ms of [0, 20, 60, 90]) {
      await using spawned = spawnCli(['verify', path]);
      await sleep(ms);
      spawned.kill('SIGKILL');
      await spawned.exit;
    }
    expect(await qemuCompare(path, copy)).toBe(true);
  });
});
