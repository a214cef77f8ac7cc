/** Disks beside the usual: filters above them, jobs on them, chains that were put together by hand. */
import { truncateSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { makeTemplate } from '../support/guest-content.js';
import { mustRun } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import {
  allocate,
  allocateAny,
  atMonitor,
  cliJson,
  copyOf,
  diskArgs,
  expectAlone,
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

const SIZE = 8 * MiB;

function template(size = SIZE): string {
  const path = scratchPath('template.raw');
  makeTemplate(path, { size, seed: 11 });
  return path;
}

const blockdev = (node: object) => ['-blockdev', JSON.stringify(node)];
const fileNode = (filename: string) => ({ driver: 'file', filename });

/** A device above a filter above the image. */
function filtered(file: string, filter: object): string[] {
  return [
    ...['-object', 'throttle-group,id=group,x-bps-total=0'],
    ...blockdev({ driver: 'qcow2', 'node-name': 'inner', file: fileNode(file) }),
    ...blockdev({ ...filter, 'node-name': 'disk', file: 'inner' }),
    ...['-device', 'virtio-blk-pci,id=dev-disk,drive=disk'],
  ];
}

describe.runIf(withQemu)('a disk below a filter', () => {
  it.each([
    [{ driver: 'throttle', 'throttle-group': 'group' }, []],
    [{ driver: 'throttle', 'throttle-group': 'group' }, ['--drop-backing']],
    [{ driver: 'copy-on-read' }, []],
    [{ driver: 'copy-on-read' }, ['--drop-backing']],
  ])('is populated (%o, %s)', async (filter, options) => {
    const file = await overlayOf(template());
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(filtered(file, filter));
    expect(await allocate(machine.qmp, 'dev-disk', ...options)).toMatchObject({
      format: 'qcow2',
      after: { allocated: SIZE },
      verified: true,
    });
    await machine.quit();
    await expectChecked(file, 'qcow2');
    await expectAlone(file, 'qcow2', before);
  });
});

describe.runIf(withQemu)('a chain of nodes', () => {
  it('that was put together by hand is populated, and freed', async () => {
    const base = template();
    const middle = await overlayOf(base);
    await qemuIo(middle, 'qcow2', 'write -P 8 2M 1M');
    const file = await overlayOf(middle, { backingFormat: 'qcow2' });
    await qemuIo(file, 'qcow2', 'write -P 9 3M 1M');
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine([
      ...blockdev({ driver: 'raw', 'node-name': 'base', 'read-only': true, file: fileNode(base) }),
      ...blockdev({ driver: 'qcow2', 'node-name': 'middle', 'read-only': true, file: fileNode(middle), backing: 'base' }),
      ...diskArgs('disk', 'qcow2', file, { backing: 'middle' }),
    ]);
    const args = ['--offset', '1M', '--length', '4M'];
    expect(await allocate(machine.qmp, 'disk', ...args)).toMatchObject({ allocated: 3 * MiB, skipped: MiB });
    await allocate(machine.qmp, 'disk', '--drop-backing');
    await machine.quit();
    await expectChecked(file, 'qcow2');
    await mustRun('qemu-img', ['info', '-f', 'qcow2', file]);
    await expectContent(file, 'qcow2', before);
    expect(await ownRanges(middle, 'qcow2')).toEqual([[2 * MiB, MiB]]);
  });
});

describe.runIf(withQemu)('a disk', () => {
  it('that is read-only is refused, and can be looked at', async () => {
    const file = await overlayOf(template());
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file, { 'read-only': true }));
    const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk');
    expect(document.error).toMatchObject({ code: 'UNSUPPORTED' });
    expect(status).toBe(1);
    const map = await cliJson<object[]>(['map', '--qmp', machine.qmp, '--device', 'disk']);
    expect(map.status, map.stderr).toBe(0);
    const info = await cliJson(['info', '--qmp', machine.qmp, '--device', 'disk']);
    expect(info.status, info.stderr).toBe(0);
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([]);
  });

  it('is left as it is by a dry run', async () => {
    const file = await overlayOf(template());
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    for (const options of [[], ['--drop-backing'], ['--route', 'stream']]) {
      const result = await allocate(machine.qmp, 'disk', '--dry-run', ...options);
      expect(result).toMatchObject({ after: null, verified: null, allocated: 0, before: { allocated: 0 } });
      expect(result.plan.length).toBeGreaterThan(0);
    }
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([]);
  });

  it('with nothing below it has nothing to drop', async () => {
    const file = await overlayOf(null, { size: SIZE });
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    expect(await allocate(machine.qmp, 'disk', '--drop-backing', ...MAPPED)).toMatchObject({ plan: [], allocated: 0 });
    await machine.quit();
  });

  it('of an odd template is populated to its end', async () => {
    const base = template();
    truncateSync(base, 5 * MiB + 100);
    const file = await overlayOf(base, { size: SIZE });
    await qemuIo(file, 'qcow2', 'write -c -P 4 1M 64k');
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    await allocate(machine.qmp, 'disk');
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
    await expectChecked(file, 'qcow2');
    await expectAlone(file, 'qcow2', before);
  });

  it('is populated beside a stream that was left to QEMU', async () => {
    const file = await overlayOf(template());
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const { document } = await allocateAny<{ job: string }>(machine.qmp, 'disk', '--detach', '--speed', '512k');
    const outcome = await allocateAny<AllocationResult>(machine.qmp, 'disk', '--offset', '4M');
    expect(outcome.status, outcome.stderr).toBe(0);
    await atMonitor(machine.qmp, async (client) => {
      const jobs = await client.execute('query-jobs');
      expect(jobs.map(({ id }) => id)).toEqual([document.job]);
      await client.execute('block-job-set-speed', { device: document.job, speed: 0 });
      await waitFor('the job’s end', async () => (await client.execute('query-jobs')).length === 0);
    });
    await machine.quit();
    await expectChecked(file, 'qcow2');
    await expectContent(file, 'qcow2', before);
  });
});
