import { describe, expect, it } from 'vitest';
import { random } from '../support/patterns.js';
import { requires } from '../support/requirements.js';
import { waitFor } from '../support/wait.js';
import { startRelay, type Cut, type Relay } from './relay.js';
import {
  expectClean,
  expectFailure,
  expectIntact,
  expectPopulated,
  leftovers,
  makeDisk,
  makeTemplate,
  MiB,
  mustAllocate,
  ROUTES,
  soak,
  startAllocate,
  startHost,
  timely,
  TOOLS,
  type RouteKind,
} from './rig.js';

const runnable = requires({ tools: TOOLS });
const SMALL = 12 * MiB;
const cuts = soak ? 100 : 10;
const seed = Number(process.env.THICKEN_SEED ?? 4711);

/** In the middle of some message, whichever its size: the description of all commands is the most of all bytes. */
function randomCut(next: () => number, { ends }: Relay): Cut {
  const direction = next() % 2 === 0 ? 'toQemu' : 'fromQemu';
  const all = ends[direction];
  const message = next() % all.length;
  const begin = all[message - 1] ?? 0;
  return { direction, after: begin + (next() % (all[message]! - begin)) };
}

/** An uncut run: what passes. */
async function wholeRun(route: RouteKind, template: string): Promise<Relay> {
  const disk = await makeDisk(template);
  await using host = await startHost({ disks: [disk.overlay] });
  await using relay = await startRelay(host.monitors[0]);
  await mustAllocate(host, { route, monitor: relay.path });
  return relay;
}

describe.runIf(runnable).each(ROUTES)('a monitor cut in the middle of a message of %s', (route) => {
  it(
    'is told as such; nothing stays behind, and the next run completes',
    async () => {
      const next = random(seed);
      const template = await makeTemplate(SMALL);
      const whole = await wholeRun(route, template);
      for (let i = 0; i < cuts; i++) {
        const cut = randomCut(next, whole);
        const disk = await makeDisk(template);
        await using host = await startHost({ disks: [disk.overlay] });
        await using relay = await startRelay(host.monitors[0], { cut });
        const spawned = startAllocate(host, { route, monitor: relay.path });
        const { status, stdout, stderr } = await timely(spawned);
        const place = `${JSON.stringify(cut)}: ${stdout}${stderr}`;
        // A run of fewer messages than the first may be over before the cut; else the result may
        // have been there, and only the clean-up was cut.
        if (status === 0) expect(JSON.parse(stdout), place).toMatchObject({ after: {} });
        else await expectFailure(spawned, ['QMP_LOST', 'EPIPE', 'ECONNRESET']);
        expect(await leftovers(host), place).toEqual([]);
        await mustAllocate(host, { route });
        await expectClean(host);
        await expectPopulated(host, disk, { alone: route === 'stream' });
      }
    },
    cuts * 15_000 + 60_000,
  );

  it('that can’t be had again keeps what the next run finds and removes', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    await using relay = await startRelay(host.monitors[0], { cut: { direction: 'toQemu', after: 700 }, again: false });
    await expectFailure(startAllocate(host, { route, speed: '4M', monitor: relay.path }), ['QMP_LOST']);
    await relay.cut;
    await mustAllocate(host, { route });
    await expectClean(host);
    await host.quit();
    await expectIntact(disk, { alone: route === 'stream' });
  });
});

describe.runIf(runnable)('a monitor that somebody else has', () => {
  it('is told as busy, and nothing is changed', async () => {
    const disk = await makeDisk(await makeTemplate(SMALL));
    await using host = await startHost({ disks: [disk.overlay] });
    const { QmpClient } = await import('../../lib/qmp/client.js');
    {
      await using other = await QmpClient.connect(host.monitors[0]);
      await waitFor('the monitor', () => other.state === 'ready');
      const outcome = await timely(startAllocate(host));
      expect(outcome.status).toBe(1);
      expect(JSON.parse(outcome.stdout)).toMatchObject({ error: { code: 'MONITOR_BUSY' } });
    }
    await expectClean(host);
    await mustAllocate(host);
    await host.quit();
    await expectIntact(disk);
  });
});
