/** Images whose clusters are mapped in parts: QEMU 7.2 copies them only if it is asked with care. */
import { describe, expect, it } from 'vitest';
import { makeTemplate } from '../support/guest-content.js';
import { qemuIo } from '../support/qemu-io.js';
import { scratchPath } from '../support/scratch.js';
import {
  allocate,
  allocateAny,
  copyOf,
  diskArgs,
  expectChecked,
  expectContent,
  MAPPED,
  MiB,
  overlayOf,
  ownRanges,
  startMachine,
  withQemu,
  type Refusal,
} from './helpers.js';

const SIZE = 16 * MiB;

async function partlyMapped(): Promise<string> {
  const template = scratchPath('template.raw');
  makeTemplate(template, { size: SIZE, seed: 1 });
  const file = await overlayOf(template, { options: 'extended_l2=on,cluster_size=128k' });
  await qemuIo(file, 'qcow2', 'write -P 5 7M 100k', 'write -P 6 9M 4k', 'write -z 10300k 4k');
  return file;
}

describe.runIf(withQemu)('an image with subclusters', () => {
  it('is populated from the midst of a cluster', async () => {
    const file = await partlyMapped();
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    await allocate(machine.qmp, 'disk', '--offset', '7300k', '--length', '1k');
    expect(await allocate(machine.qmp, 'disk')).toMatchObject({ verified: true });
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
    await expectChecked(file, 'qcow2');
    await expectContent(file, 'qcow2', before);
  });

  it('is populated before its backing file is dropped', async () => {
    const file = await partlyMapped();
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const { plan } = await allocate(machine.qmp, 'disk', '--drop-backing', ...MAPPED);
    expect(new Set(plan.map(({ route }) => route))).toEqual(new Set(['populate', 'stream']));
    await machine.quit();
    await expectChecked(file, 'qcow2');
    await expectContent(file, 'qcow2', before);
  });

  it.each([['--route=stream'], ['--detach']])('is not left to %s, which would end QEMU', async (option) => {
    const file = await partlyMapped();
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk', option);
    expect(document).toMatchObject({ error: { code: 'USAGE' } });
    expect(status).toBe(2);
    await machine.quit();
  });
});
