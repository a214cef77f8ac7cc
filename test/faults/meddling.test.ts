import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { QmpClient } from '../../lib/qmp/client.js';
import type { Refusal } from '../storage/helpers.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import {
  expectClean,
  expectFailure,
  expectIntact,
  expectPopulated,
  isPopulated,
  leftovers,
  makeDisk,
  makeTemplate,
  mustAllocate,
  ROUTES,
  startAllocate,
  startHost,
  TOOLS,
  underway,
  type Disk,
  type Host,
} from './rig.js';

const runnable = requires({ tools: TOOLS });

async function exportOf(host: Host): Promise<string> {
  const id = (await leftovers(host)).find((name) => /^thicken-\d+-\d+-[0-9a-f]{14}-[0-9a-f]+$/.test(name));
  expect(id).toBeDefined();
  return id!;
}

async function expectSecondRun(host: Host, disk: Disk, route: 'populate' | 'stream'): Promise<void> {
  await mustAllocate(host, { route });
  await expectClean(host);
  await expectPopulated(host, disk, { alone: route === 'stream' });
}

describe.runIf(runnable).each(ROUTES)('somebody else at the monitor while %s runs', (route) => {
  it('removes the export: told as such', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '6M' });
    await underway(spawned);
    await host.ask('block-export-del', { id: await exportOf(host), mode: 'hard' });
    const { error } = await expectFailure(spawned, ['NBD_LOST']);
    expect(error.message).toMatch(/export/);
    await expectClean(host);
    await expectSecondRun(host, disk, route);
  });

  it('stops the NBD server and starts another: that one stays', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '6M' });
    await underway(spawned);
    await host.ask('nbd-server-stop');
    const path = scratchPath('other-nbd');
    await host.ask('nbd-server-start', { addr: { type: 'unix', data: { path } } });
    await expectFailure(spawned, ['NBD_LOST']);
    expect(await leftovers(host)).toEqual([]);
    expect(existsSync(path)).toBe(true);
    await host.ask('nbd-server-stop');
    await expectSecondRun(host, disk, route);
  });

  it('unplugs the device: told as such, or it makes no difference', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '12M' });
    await underway(spawned);
    await host.ask('device_del', { id: 'disk0' });
    const { error } = await expectFailure(spawned, ['UNKNOWN_DEVICE']);
    expect(error.message).toMatch(/"disk0"/);
    await expectClean(host);
    await mustAllocate(host, { route, device: 'node0' });
    await host.quit();
    await expectIntact(disk, { alone: route === 'stream' });
  });
});

describe.runIf(runnable)('somebody else at the monitor', () => {
  it('cancels the stream: told as such', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route: 'stream', speed: '6M' });
    await underway(spawned);
    await host.ask('job-cancel', { id: await exportOf(host) });
    await expectFailure(spawned, ['CANCELLED'], 130);
    await expectClean(host);
    await expectSecondRun(host, disk, 'stream');
  });
});

describe.runIf(runnable)('two runs on two disks of one QEMU', () => {
  it('do not meddle with each other: the second is told that the NBD server is taken', async () => {
    const template = await makeTemplate();
    const disks = [await makeDisk(template), await makeDisk(template)];
    await using host = await startHost({ disks: disks.map(({ overlay }) => overlay) });
    const first = startAllocate(host, { speed: '6M' });
    await underway(first);
    const used = await leftovers(host);
    const second = startAllocate(host, { device: 'disk1', monitor: host.monitors[1] });
    const { status, stdout } = await second.exit;
    expect(status, stdout).toBe(1);
    expect((JSON.parse(stdout) as Refusal).error.code).toBe('NBD_BUSY');
    expect(await leftovers(host)).toEqual(used);
    expect((await first.exit).status).toBe(0);
    await expectClean(host);
    await mustAllocate(host, { device: 'disk1', monitor: host.monitors[1] });
    await expectClean(host);
    await host.quit();
    for (const disk of disks) {
      expect(await isPopulated(disk.overlay)).toBe(true);
      await expectIntact(disk);
    }
  });

  it('begin at the same moment after a killed one: each completes, or finds the server taken', async () => {
    const template = await makeTemplate();
    const disks = [await makeDisk(template), await makeDisk(template)];
    await using host = await startHost({ disks: disks.map(({ overlay }) => overlay) });
    for (let round = 0; round < 3; round++) {
      const killed = startAllocate(host, { speed: '2M' });
      await underway(killed);
      killed.kill('SIGKILL');
      await killed.exit;
      const runs = [0, 1].map((n) =>
        startAllocate(host, { device: `disk${n}`, monitor: host.monitors[n]!, more: ['--offset', `${round * 6}M`, '--length', '6M'] }),
      );
      const outcomes = await Promise.all(runs.map(({ exit }) => exit));
      for (const { status, stdout } of outcomes) {
        if (status !== 0) expect((JSON.parse(stdout) as Refusal).error.code, stdout).toBe('NBD_BUSY');
      }
      // The loser may have met the server of the killed one, and the winner no less.
      await mustAllocate(host, { more: ['--length', '1M'] });
      await expectClean(host);
    }
    await host.quit();
    for (const disk of disks) await expectIntact(disk);
  });
});

describe.runIf(runnable)('a QEMU that answers nothing any more', () => {
  it('is left by a second signal', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { speed: '6M' });
    await underway(spawned);
    host.qemu.kill('SIGSTOP');
    spawned.kill('SIGTERM');
    // Node takes a second signal for the first one's where both come at once.
    await new Promise((resolve) => setTimeout(resolve, 500));
    spawned.kill('SIGTERM');
    expect((await spawned.exit).status).toBe(130);
    host.qemu.kill('SIGCONT');
    await using client = await QmpClient.connect(host.monitors[1]);
    expect(client.state).toBe('ready');
    await mustAllocate(host);
    await expectClean(host);
    await host.quit();
    await expectIntact(disk);
  });
});
