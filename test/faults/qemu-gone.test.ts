import { describe, expect, it } from 'vitest';
import { requires } from '../support/requirements.js';
import {
  expectClean,
  expectFailure,
  expectIntact,
  isPopulated,
  makeDisk,
  makeTemplate,
  mustAllocate,
  ROUTES,
  startAllocate,
  startHost,
  TOOLS,
  underway,
} from './rig.js';
import { readdirSync } from 'node:fs';

const runnable = requires({ tools: TOOLS });

describe.runIf(runnable).each(ROUTES)('a QEMU that goes while %s runs', (route) => {
  it.each(['SIGKILL', 'quit'] as const)('by %s is told as such, and another one completes', async (how) => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route, speed: '4M' });
    await underway(spawned);
    if (how === 'quit') await host.quit();
    else host.qemu.kill('SIGKILL');
    const refusal = await expectFailure(spawned, ['QMP_LOST']);
    expect(refusal.done?.allocated).toBeGreaterThan(0);
    expect(readdirSync(host.temp)).toEqual([]);
    await host.qemu.exit;
    await expectIntact(disk);

    await using again = await startHost({ disks: [disk.overlay] });
    await mustAllocate(again, { route });
    await expectClean(again);
    await again.quit();
    expect(await isPopulated(disk.overlay)).toBe(true);
    await expectIntact(disk, { alone: route === 'stream' });
  });
});
