/** Block jobs in a real storage daemon and a real emulator, with and without events. */
import { rmSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import {
  followJob,
  startCommit,
  startDetachedStream,
  startStream,
  type BlockJob,
  type JobProgress,
} from '../../lib/qmp/block-jobs.js';
import { QmpClient } from '../../lib/qmp/client.js';
import { listJobs, steer } from '../../lib/qmp/job-control.js';
import type { OnError } from '../../lib/qmp/commands.js';
import { mountFilesystem } from '../support/filesystems.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { chain, MiB, openQemu, relayedBy, withoutEvents } from './images.js';

const here = requires({ tools: ['qemu-img', 'qemu-io', 'qemu-storage-daemon', 'qemu-system-x86_64'] });
const code = (name: string) => expect.objectContaining({ code: name });
/** So slow that no test sees the end. */
const CRAWL = { device: 'disk', speed: 64 * 1024 };

async function state(job: BlockJob, wanted: string): Promise<JobProgress> {
  return waitFor(`the job to be ${wanted}`, () => {
    const progress = job.progress();
    return progress?.state === wanted ? progress : undefined;
  });
}

async function backingOf(client: QmpClient): Promise<string | undefined> {
  const nodes = await client.execute('query-named-block-nodes', { flat: true });
  return nodes.find((node) => node['node-name'] === 'disk')?.image['backing-filename'];
}

describe.runIf(here).each(['with events', 'by polling'])('a stream %s', (way) => {
  const wrap = way === 'with events' ? undefined : withoutEvents;
  const follow = { pollMs: 20 };

  test('goes to its end, tells how far it is, and is dismissed', async () => {
    const { base, overlay } = await chain(16 * MiB);
    {
      await using qemu = await openQemu(overlay, 'daemon', wrap);
      const { client } = qemu;
      const job = await startStream(client, { device: 'disk', speed: 32 * MiB }, follow);
      const seen: JobProgress[] = [];
      job.on('progress', (progress) => seen.push(progress));
      expect(await job.outcome).toEqual({ status: 'completed', position: 16 * MiB, total: 16 * MiB });
      expect(await client.execute('query-jobs')).toEqual([]);
      expect(await backingOf(client)).toBeUndefined();
      expect(seen.map(({ state: name }) => name)).toEqual(expect.arrayContaining(['running', 'concluded']));
      expect(seen.some(({ position }) => position > 0 && position < 16 * MiB)).toBe(true);
      expect(seen.map(({ position }) => position)).toEqual(seen.map(({ position }) => position).sort((a, b) => a - b));
      expect(seen.at(-1)).toMatchObject({ id: job.id, type: 'stream', position: 16 * MiB, secondsLeft: null });
      await job.cancel();
      await job[Symbol.asyncDispose]();
    }
    await mustRun('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', base, overlay]);
  });

  test('is paused, resumed, sped up and cancelled while it runs', async () => {
    const { overlay } = await chain(16 * MiB);
    await using qemu = await openQemu(overlay, 'daemon', wrap);
    const { client } = qemu;
    const job = await startStream(client, { ...CRAWL, jobId: 'mine' }, follow);
    expect(job.id).toBe('mine');
    await job.pause();
    const { position } = await state(job, 'paused');
    await job.pause();
    await job.setSpeed(Infinity);
    await new Promise((resolve) => setTimeout(resolve, 100));
    expect(await client.execute('query-block-jobs')).toMatchObject([{ offset: position, speed: 0, status: 'paused' }]);
    await job.setSpeed(2 * MiB);
    expect(await client.execute('query-block-jobs')).toMatchObject([{ speed: 2 * MiB }]);
    await job.resume();
    await job.resume();
    await waitFor('the job to go on', () => (job.progress()?.position ?? 0) > position);
    await job.cancel();
    await job.cancel();
    const outcome = await job.outcome;
    expect(outcome).toMatchObject({ status: 'cancelled', total: 16 * MiB });
    expect(outcome.position).toBeLessThan(16 * MiB);
    expect(await client.execute('query-jobs')).toEqual([]);
    await expect(job.pause()).rejects.toEqual(code('UNKNOWN_JOB'));
    // What is below is still needed.
    expect(await backingOf(client)).toBeDefined();
  });

  test('is cancelled and dismissed on leaving, and by a signal', async () => {
    const { overlay } = await chain(16 * MiB);
    await using qemu = await openQemu(overlay, 'daemon', wrap);
    const { client } = qemu;
    let left: BlockJob;
    {
      await using job = await startStream(client, CRAWL, follow);
      left = job;
      await job.pause();
      expect(await client.execute('query-jobs')).toHaveLength(1);
    }
    expect(await left.outcome).toMatchObject({ status: 'cancelled' });
    expect(await client.execute('query-jobs')).toEqual([]);
    const abort = new AbortController();
    const job = await startStream(client, CRAWL, { ...follow, signal: abort.signal });
    abort.abort();
    expect(await job.outcome).toMatchObject({ status: 'cancelled' });
    expect(await client.execute('query-jobs')).toEqual([]);
    await expect(startStream(client, CRAWL, { signal: abort.signal })).rejects.toEqual(code('CANCELLED'));
    expect(await client.execute('query-jobs')).toEqual([]);
  });

  test('waits to be finalized where that is asked for', async () => {
    const { overlay } = await chain(2 * MiB);
    await using qemu = await openQemu(overlay, 'daemon', wrap);
    const job = await startStream(qemu.client, { device: 'disk', autoFinalize: false }, follow);
    await state(job, 'pending');
    expect(await backingOf(qemu.client)).toBeDefined();
    await job.finalize();
    expect(await job.outcome).toMatchObject({ status: 'completed' });
    expect(await backingOf(qemu.client)).toBeUndefined();
  });

  test('that QEMU takes along rejects with QMP_LOST', async () => {
    const { overlay } = await chain(2 * MiB);
    await using qemu = await openQemu(overlay, 'daemon', wrap);
    const job = await startStream(qemu.client, CRAWL, follow);
    process.kill(qemu.pid, 'SIGKILL');
    await expect(job.outcome).rejects.toEqual(code('QMP_LOST'));
    await job[Symbol.asyncDispose]();
    await expect(job.cancel()).resolves.toBeUndefined();
    await expect(job.pause()).rejects.toEqual(code('QMP_LOST'));
  });

  test('of somebody else’s is watched and left alone', async () => {
    const { overlay } = await chain(2 * MiB);
    await using qemu = await openQemu(overlay, 'daemon', wrap);
    const { client } = qemu;
    const id = await startDetachedStream(client, CRAWL);
    const watched = await followJob(client, id, follow);
    await watched[Symbol.asyncDispose]();
    await expect(watched.outcome).rejects.toEqual(code('CANCELLED'));
    const again = await followJob(client, id, follow);
    expect(await client.execute('query-jobs')).toMatchObject([{ id, status: 'running' }]);
    await again.setSpeed(Infinity);
    // QEMU dismisses it at its end, which only an event tells how.
    if (way === 'with events') expect(await again.outcome).toMatchObject({ status: 'completed', position: 2 * MiB });
    else await expect(again.outcome).rejects.toEqual(code('JOB_GONE'));
    await expect(followJob(client, id)).rejects.toEqual(code('UNKNOWN_JOB'));
  });
});

describe.runIf(here)('a stream', () => {
  test('through a relay, as libvirt’s', async () => {
    const { overlay } = await chain(4 * MiB);
    await using qemu = await openQemu(overlay);
    await using client = await QmpClient.connect(relayedBy(qemu.client));
    const job = await startStream(client, { device: 'disk' }, { pollMs: 20 });
    expect(await job.outcome).toMatchObject({ status: 'completed', position: 4 * MiB });
  });

  test('stops at the base that is named, and records its name', async () => {
    const { base, overlay: middle } = await chain(4 * MiB);
    const top = scratchPath('top.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', middle, top]);
    await using qemu = await openQemu(top);
    const { client } = qemu;
    const job = await startStream(client, { device: 'disk', base, backingFile: `${base}`, onError: 'report' });
    expect(await job.outcome).toMatchObject({ status: 'completed' });
    expect(await backingOf(client)).toBe(base);
    const nodes = await client.execute('query-named-block-nodes', { flat: true });
    expect(nodes.map(({ file }) => file)).not.toContain(middle);
  });

  test('that QEMU refuses, or that makes no sense, is an error', async () => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    const { client } = qemu;
    await expect(startStream(client, { device: 'absent' })).rejects.toMatchObject({ code: 'QMP_COMMAND', command: 'block-stream' });
    for (const speed of [0, -1, NaN]) {
      await expect(startStream(client, { device: 'disk', speed })).rejects.toBeInstanceOf(RangeError);
    }
    const job = await startStream(client, CRAWL);
    await expect(startStream(client, { device: 'disk' })).rejects.toEqual(code('QMP_COMMAND'));
    await expect(job.complete()).rejects.toEqual(code('QMP_COMMAND'));
    await expect(job.setSpeed(0)).rejects.toBeInstanceOf(RangeError);
    await job[Symbol.asyncDispose]();
  });

  test('that starts after nobody waits for it any more is cancelled', async () => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    await qemu.client.close();
    await using client = await QmpClient.connect(qemu.address, { commandTimeoutMs: 200 });
    const cancelled = client.waitFor('BLOCK_JOB_CANCELLED');
    process.kill(qemu.pid, 'SIGSTOP');
    await expect(startStream(client, CRAWL)).rejects.toEqual(code('QMP_TIMEOUT'));
    process.kill(qemu.pid, 'SIGCONT');
    await cancelled;
    await waitFor('the job to be dismissed', async () => (await client.execute('query-jobs')).length === 0);
  });

  test.each(['disposing', 'aborting'])('is left where QEMU does not answer: %s does not wait for ever', async (how) => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    await qemu.client.close();
    const client = await QmpClient.connect(qemu.address, { commandTimeoutMs: 200 });
    const abort = new AbortController();
    const job = await startStream(client, CRAWL, { signal: abort.signal });
    await state(job, 'running');
    process.kill(qemu.pid, 'SIGSTOP');
    if (how === 'disposing') await job[Symbol.asyncDispose]();
    else abort.abort();
    await expect(job.outcome).rejects.toMatchObject({ code: expect.stringMatching(/^(QMP_TIMEOUT|CANCELLED)$/) });
    await client.close();
    process.kill(qemu.pid, 'SIGCONT');
  });

  test('goes on where QEMU was too busy to answer a look', async () => {
    const { overlay } = await chain(2 * MiB);
    await using qemu = await openQemu(overlay);
    await qemu.client.close();
    await using client = await QmpClient.connect(qemu.address, { commandTimeoutMs: 500 });
    const job = await startStream(client, CRAWL, { pollMs: 5 });
    process.kill(qemu.pid, 'SIGSTOP');
    await expect(client.execute('query-jobs')).rejects.toEqual(code('QMP_TIMEOUT'));
    await expect(client.execute('query-jobs')).rejects.toEqual(code('QMP_TIMEOUT'));
    process.kill(qemu.pid, 'SIGCONT');
    await waitFor('QEMU to answer', () => job.setSpeed(Infinity).then(() => true, () => false));
    expect(await job.outcome).toMatchObject({ status: 'completed' });
  });
});

describe.runIf(here)('what is done before the graph changes', () => {
  test('is the time to flush: then nothing is lost with a QEMU that is killed', async () => {
    const { base, overlay } = await chain(16 * MiB);
    {
      await using qemu = await openQemu(overlay);
      const beforeFinalize = async (): Promise<void> => {
        expect(await backingOf(qemu.client)).toBeDefined();
        await mustRun('qemu-io', ['-f', 'raw', '-c', 'flush', qemu.nbd!]);
      };
      const job = await startStream(qemu.client, { device: 'disk' }, { beforeFinalize });
      expect(await job.outcome).toMatchObject({ status: 'completed' });
      expect(await backingOf(qemu.client)).toBeUndefined();
      process.kill(qemu.pid, 'SIGKILL');
      await qemu.client.onLost;
    }
    await mustRun('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', base, overlay]);
    await mustRun('qemu-img', ['check', '-q', overlay]);
  });

  test('is done once, also where QEMU is too busy to take the order to go on', async () => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    await qemu.client.close();
    await using client = await QmpClient.connect(qemu.address, { commandTimeoutMs: 300 });
    let times = 0;
    const beforeFinalize = async (): Promise<void> => {
      times++;
      process.kill(qemu.pid, 'SIGSTOP');
      setTimeout(() => process.kill(qemu.pid, 'SIGCONT'), 700);
    };
    const job = await startStream(client, { device: 'disk' }, { beforeFinalize, pollMs: 10 });
    expect(await job.outcome).toMatchObject({ status: 'completed' });
    expect(times).toBe(1);
  });

  test('undoes the job where it fails, and may be cancelled', async () => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    const { client } = qemu;
    const failing = () => Promise.reject(new TypeError('mine'));
    const failed = await startStream(client, { device: 'disk' }, { beforeFinalize: failing });
    expect(await failed.outcome).toMatchObject({ status: 'failed', error: { code: 'INTERNAL', message: expect.stringMatching(/^mine/) } });
    const job = await startStream(client, { device: 'disk', jobId: 'mine' }, {
      beforeFinalize: () => steer(client, 'mine', 'cancel'),
    });
    expect(await job.outcome).toMatchObject({ status: 'cancelled' });
    expect(await backingOf(client)).toBeDefined();
    expect(await client.execute('query-jobs')).toEqual([]);
  });
});

describe.runIf(here)('a commit', () => {
  test('of the active image is completed when it is ready', async () => {
    const { base, overlay } = await chain(4 * MiB);
    const top = scratchPath('top.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'qcow2', '-b', overlay, top]);
    await using qemu = await openQemu(top);
    const job = await startCommit(qemu.client, { 'job-id': 'back', device: 'disk' });
    await state(job, 'ready');
    await job.complete();
    expect(await job.outcome).toMatchObject({ status: 'completed' });
    expect(await qemu.client.execute('query-jobs')).toEqual([]);
    expect(base).toBeTruthy();
  });
});

const space = here && requires({ root: true, loop: true, tools: ['mkfs.ext4'] });

describe.runIf(space)('a full file system', () => {
  /** An overlay that has room for a part of what is below, and a file whose removal makes room. */
  async function cramped() {
    const disk = await mountFilesystem({ type: 'ext4', size: 64 * MiB });
    const ballast = `${disk.path}/ballast`;
    await mustRun('fallocate', ['--length', '32M', ballast]);
    const { base, overlay } = await chain(40 * MiB, `${disk.path}/overlay.qcow2`);
    return { base, overlay, ballast, [Symbol.asyncDispose]: disk.dispose };
  }

  test.each<OnError>(['report', 'ignore'])('ends the job with ENOSPC on %s', async (onError) => {
    await using files = await cramped();
    await using qemu = await openQemu(files.overlay);
    const job = await startStream(qemu.client, { device: 'disk', onError });
    const outcome = await job.outcome;
    expect(outcome).toMatchObject({ status: 'failed', error: { code: 'ENOSPC', desc: 'No space left on device' } });
    // With `ignore` QEMU goes to the end, and fails there.
    expect(outcome.position === 40 * MiB).toBe(onError === 'ignore');
    expect(await qemu.client.execute('query-jobs')).toEqual([]);
  });

  test.each<[OnError, string]>([
    ['stop', 'with events'],
    ['enospc', 'with events'],
    ['stop', 'by polling'],
  ])('pauses the job on %s %s; with room it goes on to the end', async (onError, way) => {
    await using files = await cramped();
    {
      await using qemu = await openQemu(files.overlay, 'daemon', way === 'by polling' ? withoutEvents : undefined);
      const { client } = qemu;
      const job = await startStream(client, { device: 'disk', onError }, { pollMs: 20 });
      const stopped = await state(job, 'paused-by-error');
      expect(stopped).toMatchObject({ ioStatus: 'nospace', secondsLeft: null });
      expect(await listJobs(client)).toMatchObject([{ id: job.id, status: 'paused-by-error', secondsLeft: null }]);
      rmSync(files.ballast);
      await job.resume();
      expect(await job.outcome).toMatchObject({ status: 'completed', position: 40 * MiB });
    }
    await mustRun('qemu-img', ['compare', '-q', '-f', 'raw', '-F', 'qcow2', files.base, files.overlay]);
  });

  test('a job that an error paused can be cancelled', async () => {
    await using files = await cramped();
    await using qemu = await openQemu(files.overlay);
    const job = await startStream(qemu.client, { device: 'disk', onError: 'stop' });
    await state(job, 'paused-by-error');
    await job.cancel();
    expect(await job.outcome).toMatchObject({ status: 'cancelled' });
    expect(await qemu.client.execute('query-jobs')).toEqual([]);
  });
});

describe.runIf(here)('a storage fault', () => {
  /** A node `broken` whose backing fails to read: once, or always. */
  async function broken(client: QmpClient, once: boolean): Promise<void> {
    const { base, overlay } = await chain(2 * MiB);
    const fault = { event: 'none', iotype: 'read', errno: 5, once };
    const file = { driver: 'blkdebug', image: { driver: 'file', filename: base }, 'inject-error': [fault] };
    await client.execute('blockdev-add', { driver: 'raw', 'node-name': 'faulty', file });
    await client.execute('blockdev-add', {
      driver: 'qcow2',
      'node-name': 'broken',
      file: { driver: 'file', filename: overlay },
      backing: 'faulty',
    });
  }

  async function remove(client: QmpClient): Promise<void> {
    for (const name of ['broken', 'faulty']) await client.execute('blockdev-del', { 'node-name': name });
  }

  async function empty(): Promise<string> {
    const file = scratchPath('empty.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file, '1M']);
    return file;
  }

  test('ends the job with EIO, or pauses it until it is resumed', async () => {
    await using qemu = await openQemu(await empty());
    const { client } = qemu;
    await broken(client, true);
    const failed = await startStream(client, { device: 'broken' });
    expect(await failed.outcome).toMatchObject({ status: 'failed', error: { code: 'EIO' } });
    await remove(client);
    await broken(client, true);
    const stopped = await startStream(client, { device: 'broken', onError: 'enospc' });
    // This is another error than the one to wait for.
    expect(await stopped.outcome).toMatchObject({ status: 'failed', error: { code: 'EIO' } });
    await remove(client);
    await broken(client, true);
    const resumed = await startStream(client, { device: 'broken', onError: 'stop' });
    expect(await state(resumed, 'paused-by-error')).toMatchObject({ ioStatus: 'failed' });
    await resumed.resume();
    expect(await resumed.outcome).toMatchObject({ status: 'completed', position: 2 * MiB });
  });
});

describe.runIf(here)('jobs of whoever', () => {
  test('are listed with their pace, and steered by their ids', async () => {
    const { overlay } = await chain(32 * MiB);
    await using qemu = await openQemu(overlay, 'guest');
    const { client } = qemu;
    expect(await listJobs(client)).toEqual([]);
    await expect(steer(client, 'x', 'pause')).rejects.toThrow(/there is no job "x".*there are no jobs at all/);
    const job = await startStream(client, { device: 'disk', jobId: 'mine', speed: MiB });
    const listed = await waitFor('the job to move', async () => {
      const [entry] = await listJobs(client, { sampleMs: 600 });
      return entry?.secondsLeft !== null && entry;
    });
    expect(listed).toEqual({
      id: 'mine',
      type: 'stream',
      device: 'disk0',
      status: 'running',
      position: expect.any(Number),
      total: 32 * MiB,
      speed: MiB,
      secondsLeft: expect.any(Number),
    });
    expect(listed.secondsLeft).toBeGreaterThan(0);
    await expect(steer(client, 'other', 'pause')).rejects.toMatchObject({
      code: 'UNKNOWN_JOB',
      message: expect.stringMatching(/no job "other".*there is "mine"/),
    });
    await steer(client, 'mine', { speed: Infinity });
    await steer(client, 'mine', { speed: 2 * MiB });
    await steer(client, 'mine', 'pause');
    await steer(client, 'mine', 'pause');
    await state(job, 'paused');
    expect(await listJobs(client)).toMatchObject([{ status: 'paused', speed: 2 * MiB, secondsLeft: null }]);
    await steer(client, 'mine', 'resume');
    await steer(client, 'mine', 'cancel');
    expect(await job.outcome).toMatchObject({ status: 'cancelled' });
    await expect(steer(client, 'mine', 'cancel')).rejects.toEqual(code('UNKNOWN_JOB'));
  });

  test('that ended when nobody was there are dismissed by cancel', async () => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    const { client } = qemu;
    const ended = client.waitFor(({ name, data }) => name === 'JOB_STATUS_CHANGE' && data['status'] === 'concluded');
    await client.execute('block-stream', { 'job-id': 'orphan', device: 'disk', 'auto-dismiss': false });
    await ended;
    expect(await listJobs(client)).toMatchObject([{ id: 'orphan', status: 'concluded', secondsLeft: null }]);
    await expect(steer(client, 'orphan', 'pause')).rejects.toEqual(code('QMP_COMMAND'));
    await steer(client, 'orphan', 'cancel');
    expect(await client.execute('query-jobs')).toEqual([]);
  });

  test('listing can be cancelled', async () => {
    const { overlay } = await chain(MiB);
    await using qemu = await openQemu(overlay);
    await using _job = await startStream(qemu.client, CRAWL);
    const abort = new AbortController();
    const listing = listJobs(qemu.client, { sampleMs: 600_000, signal: abort.signal });
    setTimeout(() => abort.abort(), 20);
    await expect(listing).rejects.toEqual(code('CANCELLED'));
  });
});
