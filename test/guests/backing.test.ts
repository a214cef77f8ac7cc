/** The end of the dependence on a backing file. */
import { describe, expect, it } from 'vitest';
import { listJobs } from '../../lib/qmp/job-control.js';
import { nbdkit } from '../nbd/servers.js';
import { expectedImage, makeTemplate } from '../support/guest-content.js';
import { startGuest } from '../support/guest.js';
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
  expectChecked,
  expectContent,
  MAPPED,
  MiB,
  overlayOf,
  ownRanges,
  shutDown,
  startMachine,
  withGuest,
  withNbdkit,
  withQemu,
  type Refusal,
} from './helpers.js';

const SIZE = 16 * MiB;

async function overlay(): Promise<string> {
  const template = scratchPath('template.raw');
  makeTemplate(template, { size: SIZE, seed: 3 });
  return overlayOf(template);
}

async function backingOf(file: string): Promise<unknown> {
  const text = await mustRun('qemu-img', ['info', '--output=json', '-U', file]);
  return (JSON.parse(text) as Record<string, unknown>)['backing-filename'];
}

describe.runIf(withGuest && withNbdkit)('a guest whose backing file is dropped', () => {
  it.each([
    ['by a stream', [], ['stream']],
    ['after it was populated', ['--route', 'populate'], ['populate', 'stream']],
  ])('needs the template’s server no more (%s)', async (_how, options, routes) => {
    const template = scratchPath('template.raw');
    const base = makeTemplate(template, { size: SIZE, seed: 3 });
    const server = await nbdkit(['file', template]);
    const file = await overlayOf(server.uri);
    await using guest = await startGuest({ disks: [{ id: 'vda', file, format: 'qcow2' }] });
    await guest.base(base);
    await guest.command('churn 5 2');
    const { plan, verified } = await allocate(guest.qmpSocket, 'vda', '--drop-backing', ...options, ...MAPPED);
    expect(verified).toBe(true);
    expect([...new Set(plan.map(({ route }) => route))]).toEqual(routes);
    await server[Symbol.asyncDispose]();
    expect(await guest.ask('stop')).toMatchObject({ errors: 0, failed: 0 });
    expect(await guest.ask('verify')).toMatchObject({ errors: 0, unknown: 0, blocks: SIZE / 4096 });
    const generations = await guest.generations();
    const { document } = await cliJson(['info', '--qmp', guest.qmpSocket, '--device', 'vda']);
    expect(document).toMatchObject({ backing: [], missing: 0 });
    await shutDown(guest);
    expect(await backingOf(file)).toBeUndefined();
    const expected = scratchPath('expected.raw');
    expectedImage(expected, SIZE, base, generations);
    await expectContent(file, 'qcow2', expected);
    await expectChecked(file, 'qcow2');
  });
});

describe.runIf(withQemu)('--drop-backing', () => {
  it.each(['metadata', 'falloc'])('is done with once, at %s', async (level) => {
    const file = await overlay();
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const args = ['--drop-backing', '--preallocation', level];
    expect(await allocate(machine.qmp, 'disk', ...args)).toMatchObject({
      before: { allocated: 0 },
      after: { allocated: SIZE },
      allocated: SIZE,
    });
    const again = await allocate(machine.qmp, 'disk', ...args);
    expect(again).toMatchObject({ allocated: 0, skipped: SIZE });
    expect(again.plan.filter(({ route }) => route !== 'reserve')).toEqual([]);
    await machine.quit();
    expect(await backingOf(file)).toBeUndefined();
    await expectChecked(file, 'qcow2');
    await expectContent(file, 'qcow2', before);
  });

  it('takes one stream', async () => {
    const file = await overlay();
    const spare = scratchPath('spare-qmp');
    const monitor = ['-qmp', `unix:${spare},server=on,wait=off`];
    await using machine = await startMachine([...monitor, ...diskArgs('disk', 'qcow2', file)]);
    const created: string[] = [];
    await atMonitor(spare, async (client) => {
      client.listen(({ name, data }) => {
        if (name === 'JOB_STATUS_CHANGE' && data['status'] === 'created') created.push(String(data['id']));
      });
      await allocate(machine.qmp, 'disk', '--drop-backing', ...MAPPED);
      await client.execute('query-jobs');
    });
    expect(created).toHaveLength(1);
    await machine.quit();
  });

  it('drops what a populated image no longer needs', async () => {
    const file = await overlay();
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    await allocate(machine.qmp, 'disk');
    expect(await backingOf(file)).toBeDefined();
    const { plan, allocated } = await allocate(machine.qmp, 'disk', '--drop-backing', ...MAPPED);
    expect(plan).toMatchObject([{ route: 'stream', offset: 0, length: SIZE }]);
    expect(allocated).toBe(0);
    expect(await backingOf(file)).toBeUndefined();
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
  });

  it('frees a QED image, too', async () => {
    const template = scratchPath('template.raw');
    makeTemplate(template, { size: SIZE, seed: 3 });
    const file = await overlayOf(template, { format: 'qed' });
    const before = await copyOf(file, 'qed');
    await using machine = await startMachine(diskArgs('disk', 'qed', file));
    await allocate(machine.qmp, 'disk', '--drop-backing');
    await machine.quit();
    expect(await backingOf(file)).toBeUndefined();
    await expectChecked(file, 'qed');
    await expectContent(file, 'qed', before);
  });

  it('is refused where snapshots would lose their content', async () => {
    const file = await overlay();
    await mustRun('qemu-img', ['snapshot', '-c', 'before', file]);
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    for (const more of [[], ['--route', 'populate'], ['--dry-run'], ['--detach']]) {
      const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk', '--drop-backing', ...more);
      expect(document.error, more.join(' ')).toMatchObject({ code: 'HAS_SNAPSHOTS' });
      expect(status).toBe(1);
    }
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([]);
    expect(await backingOf(file)).toBeDefined();
  });

  it('is for the whole disk only', async () => {
    const file = await overlay();
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    for (const range of [['--offset', '1M'], ['--length', '1M'], ['--offset', '1M', '--length', '1M']]) {
      const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk', '--drop-backing', ...range);
      expect(document.error).toMatchObject({ code: 'RANGE' });
      expect(status).toBe(2);
    }
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([]);
  });
});

describe.runIf(withQemu)('a stream', () => {
  it('is refused for a part of the disk', async () => {
    const file = await overlay();
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const { status } = await allocateAny(machine.qmp, 'disk', '--route', 'stream', '--length', '1M');
    expect(status).toBe(2);
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([]);
  });

  it('is refused where snapshots would lose their content', async () => {
    const file = await overlay();
    await mustRun('qemu-img', ['snapshot', '-c', 'before', file]);
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    for (const options of [['--route', 'stream'], ['--detach']]) {
      const { document } = await allocateAny<Refusal>(machine.qmp, 'disk', ...options);
      expect(document.error).toMatchObject({ code: 'HAS_SNAPSHOTS' });
    }
    await machine.quit();
    expect(await backingOf(file)).toBeDefined();
  });

  it('can be left to QEMU', async () => {
    const file = await overlay();
    await qemuIo(file, 'qcow2', 'write -P 3 5M 1M');
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const { status, stderr, document } = await allocateAny<{ job: string }>(
      machine.qmp, 'disk', '--detach', '--speed', '1M',
    );
    expect(status, stderr).toBe(0);
    const { job } = document;
    await atMonitor(machine.qmp, async (client) => {
      expect(await listJobs(client)).toMatchObject([{ id: job, type: 'stream', speed: MiB }]);
      await client.execute('block-job-set-speed', { device: job, speed: 0 });
      await waitFor('the job’s end', async () => (await client.execute('query-jobs')).length === 0);
    });
    await machine.quit();
    expect(await backingOf(file)).toBeUndefined();
    await expectChecked(file, 'qcow2');
    await expectContent(file, 'qcow2', before);
  });

  it('is not left to QEMU where there is nothing to stream', async () => {
    const file = await overlayOf(null, { size: SIZE });
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk', '--detach');
    expect(document.error).toMatchObject({ code: 'USAGE' });
    expect(status).toBe(2);
    await machine.quit();
  });
});
