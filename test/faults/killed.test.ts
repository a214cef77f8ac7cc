import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { random } from '../support/patterns.js';
import { requires } from '../support/requirements.js';
import {
  expectClean,
  expectFailure,
  expectIntact,
  expectPopulated,
  leftovers,
  makeDisk,
  makeTemplate,
  mustAllocate,
  ROUTES,
  soak,
  startAllocate,
  startHost,
  TOOLS,
  underway,
} from './rig.js';

const runnable = requires({ tools: TOOLS });
const kills = soak ? 50 : 5;
const seed = Number(process.env.THICKEN_SEED ?? 4711);

describe.runIf(runnable).each(ROUTES)('thicken killed while %s runs', (route) => {
  it(
    'at random moments: the next run removes what it left, and completes',
    async () => {
      const next = random(seed);
      const template = await makeTemplate();
      let left = 0;
      for (let i = 0; i < kills; i++) {
        const disk = await makeDisk(template);
        await using host = await startHost({ disks: [disk.overlay] });
        const spawned = startAllocate(host, { route, speed: '16M' });
        // Every other one dies while it connects, or starts.
        if (i % 2 === 0) await underway(spawned);
        await sleep(next() % (i % 2 === 0 ? 800 : 600));
        spawned.kill('SIGKILL');
        await spawned.exit;
        if ((await leftovers(host)).length > 0) left++;
        const result = await mustAllocate(host, { route });
        expect(result.after?.allocated).toBe(result.effective.length);
        await expectClean(host);
        await expectPopulated(host, disk, { alone: route === 'stream' });
      }
      expect(left).toBeGreaterThan(kills / 3);
    },
    kills * 15_000 + 60_000,
  );

  it('leaves an image whose content does not depend on a next run', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '8M' });
    await underway(spawned);
    spawned.kill('SIGKILL');
    await spawned.exit;
    // With a stream in QEMU that nobody finalizes.
    host.qemu.kill('SIGKILL');
    await host.qemu.exit;
    await expectIntact(disk);
  });

  it('and another QEMU’s run has nothing to do with what it left', async () => {
    const template = await makeTemplate();
    const [disk, another] = [await makeDisk(template), await makeDisk(template)];
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '4M' });
    await underway(spawned);
    spawned.kill('SIGKILL');
    await spawned.exit;
    const left = await leftovers(host);
    expect(left).not.toEqual([]);
    await using second = await startHost({ disks: [another.overlay], temp: host.temp });
    await mustAllocate(second, { route });
    expect(await leftovers(host)).toEqual(left);
    await mustAllocate(host, { route });
    await expectClean(host);
    await expectClean(second);
  });

  it.each(['SIGINT', 'SIGTERM'] as const)('by %s: clean at once, and the next run goes on', async (signal) => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '6M' });
    await underway(spawned);
    spawned.kill(signal);
    const { done } = await expectFailure(spawned, ['CANCELLED'], 130);
    expect(done?.allocated).toBeGreaterThan(0);
    await expectClean(host);
    const result = await mustAllocate(host, { route });
    expect(result.skipped).toBeGreaterThanOrEqual(done!.allocated / 2);
    await expectClean(host);
    await expectPopulated(host, disk, { alone: route === 'stream' });
  });

  it('by a signal while it starts: clean, too', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    for (const ms of [0, 100, 200, 300, 400]) {
      const spawned = startAllocate(host, { route, speed: '2M' });
      await sleep(ms);
      spawned.kill('SIGTERM');
      const { signal } = await spawned.exit;
      // Before it listens to signals it has done nothing.
      expect(signal === 'SIGTERM' || signal === null).toBe(true);
      await expectClean(host);
    }
    await host.quit();
    await expectIntact(disk);
  });
});

describe.runIf(runnable)('a map, a verify or an info that is stopped', () => {
  it.each(['map', 'verify', 'info'])('%s: leaves nothing', async (command) => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const { spawnCli } = await import('../support/processes.js');
    for (const ms of [150, 250, 350]) {
      const spawned = spawnCli([command, '--qmp', host.monitors[0], '--device', 'disk0'], { env: host.env });
      await sleep(ms);
      spawned.kill('SIGTERM');
      await spawned.exit;
      await expectClean(host);
    }
  });
});
