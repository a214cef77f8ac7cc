/** What happens when thicken, its daemon, or what lies below goes away; and who may not have the image. */
import { readdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { serveFile } from '../nbd/servers.js';
import { random } from '../support/patterns.js';
import { cliMain, mustRun, run, spawnCli, start, type Spawned } from '../support/processes.js';
import { qemuCompare } from '../support/judges.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { cliJson, MiB, soak, type Refusal } from '../storage/helpers.js';
import { allocate, expectOwn, expectSame, LEAKS, lookBefore, makeOverlay, type Before } from './disks.js';
import { daemonsIn, expectNothingLeft, withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['nbdkit', 'nbdinfo', 'sha256sum'] });
const kills = soak ? 60 : 4;
const seed = Number(process.env.THICKEN_SEED ?? 815);
const SIZE = 48 * MiB;

async function makeBase(): Promise<string> {
  const base = scratchPath('base.raw');
  await mustRun('qemu-img', ['create', '-q', '-f', 'raw', base, String(SIZE)]);
  await qemuIo(base, 'raw', 'write -q -P 1 0 20M', 'write -q -P 2 24M 8M', 'write -q -P 3 40M 8M');
  return base;
}

interface Disk {
  path: string;
  format: string;
  base: string;
  before: Before;
}

async function makeDisk(format: string, name?: string, given?: string): Promise<Disk> {
  const base = given ?? (await makeBase());
  const path = await makeOverlay({ name: name ?? base, format: 'raw' }, format);
  await qemuIo(path, format, 'write -q -P 7 3M 100k', 'write -q -P 9 30M 64k');
  return { path, format, base, before: await lookBefore(path, format, [base]) };
}

const LEVELS: Record<string, string> = { qcow2: 'full', qed: 'metadata' };

function args({ path, format }: Disk, ...more: string[]): string[] {
  return ['allocate', path, '--format', format, '--preallocation', LEVELS[format]!, '--drop-backing', ...more];
}

function startSlowly(disk: Disk, speed = '16M', ...more: string[]): Spawned {
  return spawnCli([...args(disk, '--json', '--progress', 'json', '--speed', speed), ...more]);
}

async function underway(spawned: Spawned): Promise<void> {
  await spawned.output('stderr', /"position":[1-9]/, { timeout: 60_000 });
}

/** Leaked clusters (status 3) are what a killed QEMU may leave; QED wants a look after that. */
async function expectIntact({ path, format, before }: Disk): Promise<void> {
  if (format === 'qcow2') {
    const { status, stdout, stderr } = await run('qemu-img', ['check', '-f', format, path]);
    expect([0, LEAKS], stdout + stderr).toContain(status);
  }
  expect(await qemuCompare(path, before.expected, { formatA: format }), 'the content is another').toBe(true);
}

async function expectCompletes(disk: Disk): Promise<void> {
  const { path, format, base, before } = disk;
  expect(await allocate(...(args(disk).slice(1) as [string]))).toMatchObject({ verified: true });
  // What a killed QEMU leaves of a QED image is leaked for good.
  await expectSame(path, format, before, [base], format === 'qed' ? [0, LEAKS] : [0]);
  await expectOwn(path, format, 0, SIZE);
}

/** It may just have ended by itself. */
function killIfThere(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}

describe.runIf(runnable).each(['qcow2', 'qed'])('while %s at rest is populated', (format) => {
  it.each(['thicken', 'its daemon'])('%s is killed at random moments: nothing is lost or left, and the next run completes', async (whom) => {
    const next = random(seed);
    const base = await makeBase();
    for (let i = 0; i < kills; i++) {
      const disk = await makeDisk(format, undefined, base);
      const spawned = startSlowly(disk);
      // Every other one while it starts, or finishes.
      if (i % 2 === 0) await underway(spawned);
      await sleep(next() % (i % 2 === 0 ? 1500 : 400));
      if (whom === 'thicken') spawned.kill('SIGKILL');
      else for (const pid of daemonsIn(tmpdir())) killIfThere(pid);
      const { status, stdout } = await spawned.exit;
      if (whom !== 'thicken' && status !== 0) {
        expect((JSON.parse(stdout) as Refusal).error.code, stdout).toMatch(/^DAEMON_(LOST|FAILED)$/);
      }
      await expectNothingLeft();
      await expectIntact(disk);
      await expectCompletes(disk);
    }
  }, kills * 20_000 + 60_000);

  it('Ctrl-C ends it in peace, and says how far it came', async () => {
    const disk = await makeDisk(format);
    const spawned = startSlowly(disk, '8M');
    await underway(spawned);
    spawned.kill('SIGINT');
    const { status, stdout } = await spawned.exit;
    expect(status).toBe(130);
    expect(JSON.parse(stdout)).toMatchObject({ error: { code: 'CANCELLED' }, done: { allocated: expect.any(Number) } });
    await expectNothingLeft();
    await expectSame(disk.path, format, disk.before, [disk.base]);
    await expectCompletes(disk);
  });

  it('its server goes: the run fails, nothing is lost, and the next one completes', async () => {
    const base = await makeBase();
    const server = await serveFile(base);
    const disk = await makeDisk(format, server.uri, base);
    const spawned = startSlowly(disk, '8M');
    await underway(spawned);
    await server.process.dispose();
    const { status, stdout } = await spawned.exit;
    expect(status).toBe(1);
    expect(JSON.parse(stdout)).toMatchObject({ error: { code: expect.stringMatching(/^(EIO|NBD_)/) } });
    await expectNothingLeft();
    const gone = await cliJson<Refusal>(args(disk));
    expect(gone).toMatchObject({ status: 1, document: { error: { code: 'BACKING_MISSING' } } });
    await mustRun('rm', ['-f', server.socketPath]);
    await using _again = await serveFile(base, [], [], server.socketPath);
    await expectIntact(disk);
    await expectCompletes(disk);
  });

  it('its server goes and comes back in time: the run does not notice', async () => {
    const base = await makeBase();
    const server = await serveFile(base);
    const disk = await makeDisk(format, server.uri, base);
    const spawned = startSlowly(disk, '16M');
    await underway(spawned);
    await server.process.dispose();
    await mustRun('rm', ['-f', server.socketPath]);
    await using _again = await serveFile(base, [], [], server.socketPath);
    const { status, stderr } = await spawned.exit;
    expect(status, stderr).toBe(0);
    await expectSame(disk.path, format, disk.before, [disk.base]);
    await expectOwn(disk.path, format, 0, SIZE);
  });
});

/** A QEMU that has an image open for writing; a look of ours at its locks could keep it from them. */
async function startHolder(path: string, format: string): Promise<Spawned> {
  const socket = scratchPath('n');
  const holder = start('qemu-storage-daemon', [
    ...['--blockdev', `driver=file,node-name=f,filename=${path}`],
    ...['--blockdev', `driver=${format},node-name=r,file=f`],
    ...['--nbd-server', `addr.type=unix,addr.path=${socket}`],
    ...['--export', 'type=nbd,id=e,node-name=r,writable=on'],
  ]);
  await waitFor('its export', async () => {
    if (holder.child.exitCode !== null) throw new Error(holder.stderr());
    return (await run('nbdinfo', ['--size', `nbd+unix:///r?socket=${socket}`])).status === 0;
  });
  return holder;
}

describe.runIf(runnable)('an image at rest that somebody else has', () => {
  it('by another thicken is refused by the lock, and unharmed', async () => {
    const disk = await makeDisk('qcow2');
    const first = startSlowly(disk, '16M');
    await underway(first);
    const second = await cliJson<Refusal>(args(disk));
    expect(second).toMatchObject({ status: 4, document: { error: { code: 'IN_USE', path: disk.path } } });
    expect((await first.exit).status).toBe(0);
    await expectSame(disk.path, 'qcow2', disk.before, [disk.base]);
  });

  it('by a QEMU is refused; its map is told all the same, with a warning', async () => {
    const disk = await makeDisk('qcow2');
    await using _holder = await startHolder(disk.path, 'qcow2');
    for (const more of [[], ['--route', 'populate', '--preallocation', 'metadata']]) {
      const refused = await cliJson<Refusal>([...args(disk), ...more]);
      expect(refused).toMatchObject({ status: 4, document: { error: { code: 'IN_USE' } } });
      expect(refused.document.error.message).toContain('qemu-storage-da');
    }
    const info = await cliJson<{ inUse: object }>(['info', disk.path, '--format', 'qcow2']);
    expect(info).toMatchObject({ status: 0, document: { inUse: { locks: expect.any(Array) } } });
    expect(await cliJson(['map', disk.path, '--format', 'qcow2'])).toMatchObject({ status: 0 });
  });

  it('by a template’s writer is refused', async () => {
    const disk = await makeDisk('qcow2');
    await using _holder = await startHolder(disk.base, 'raw');
    const refused = await cliJson<Refusal>(args(disk));
    expect(refused).toMatchObject({ status: 4, document: { error: { code: 'IN_USE', path: disk.base } } });
    await expectIntact(disk);
  });

  it('while the daemon works, other QEMUs are refused', async () => {
    const disk = await makeDisk('qcow2');
    const spawned = startSlowly(disk, '8M', '--route', 'populate');
    await underway(spawned);
    const { status, stderr } = await run('qemu-io', ['-f', 'qcow2', '-c', 'write 0 64k', disk.path]);
    expect(status).not.toBe(0);
    expect(stderr).toMatch(/lock/);
    spawned.kill('SIGINT');
    await spawned.exit;
    expect(readdirSync(tmpdir())).toEqual([]);
  });
});

describe.runIf(runnable)('a throttled run at rest', () => {
  it('keeps to its rate, and tells its progress', async () => {
    const disk = await makeDisk('qcow2');
    const began = performance.now();
    const words = ['--format', 'qcow2', '--preallocation', 'metadata', '--json', '--progress', 'json'];
    const range = ['--offset', '4M', '--length', '20M', '--speed', '16M'];
    const { status, stderr } = await run(process.execPath, [cliMain, 'allocate', disk.path, ...words, ...range]);
    expect(status, stderr).toBe(0);
    // No upper bound: that is the machine's matter.
    expect(performance.now() - began).toBeGreaterThan(700);
    const positions = [...stderr.matchAll(/"position":(\d+)/g)].map(([, position]) => Number(position));
    expect(positions.length).toBeGreaterThan(3);
    expect(positions).toEqual([...positions].sort((a, b) => a - b));
  });
});
