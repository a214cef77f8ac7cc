import { rmSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { requires } from '../support/requirements.js';
import { expectIntact, expectSound, isPopulated, makeDisk, makeTemplate, ROUTES, soak, startAllocate, startHost, TOOLS } from './rig.js';

const runnable = requires({ tools: TOOLS });
const rounds = soak ? 20 : 3;

describe.runIf(runnable)('a QEMU killed as soon as thicken has reported', () => {
  it.each([
    ['--drop-backing', ['--drop-backing']],
    ['--drop-backing, with the reservation', ['--drop-backing', '--preallocation', 'falloc']],
    ['--route stream', ['--route', 'stream']],
  ])('after %s: the image has all of its content without the template', async (_, more) => {
    for (let round = 0; round < rounds; round++) {
      const template = await makeTemplate();
      const disk = await makeDisk(template);
      await using host = await startHost({ disks: [disk.overlay] });
      await reportThenKill(host, more);
      rmSync(template);
      await expectIntact(disk, { alone: true });
    }
  });

  it('after populate, and then --drop-backing: the same', async () => {
    const template = await makeTemplate();
    const disk = await makeDisk(template);
    await using host = await startHost({ disks: [disk.overlay] });
    expect((await startAllocate(host).exit).status).toBe(0);
    await reportThenKill(host, ['--drop-backing']);
    rmSync(template);
    await expectIntact(disk, { alone: true });
  });

  it.each(ROUTES)('after %s: every cluster is mapped', async (route) => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    await reportThenKill(host, ['--route', route]);
    await expectSound(disk.overlay);
    expect(await isPopulated(disk.overlay)).toBe(true);
    await expectIntact(disk);
  });
});

/** At the first byte of the report, not at the end of the process. */
async function reportThenKill(host: Awaited<ReturnType<typeof startHost>>, more: readonly string[]): Promise<void> {
  const { spawnCli } = await import('../support/processes.js');
  const args = ['allocate', '--qmp', host.monitors[0], '--device', 'disk0', '--json', ...more];
  const spawned = spawnCli(args, { env: host.env });
  spawned.child.stdout!.once('data', () => host.qemu.kill('SIGKILL'));
  const { stdout, stderr } = await spawned.exit;
  expect(JSON.parse(stdout), stderr).toMatchObject({ after: {} });
  host.qemu.kill('SIGKILL');
  await host.qemu.exit;
}
