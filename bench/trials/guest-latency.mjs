/**
 * What a guest's 4 KiB writes take, in its own clock, while something is done to its disk:
 * `MODE NODE SECONDS`, the node in JSON.
 */
import { execFile } from 'node:child_process';
import { statSync } from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { open } from 'thicken';
import { startGuest } from '../../build-guests/support/guest.js';
import { startStream } from '../../build-modules/qmp/block-jobs.js';
import { QmpClient } from '../../build-modules/qmp/client.js';

const [, , mode, json, duration] = process.argv;
const { driver, file, ...nodeOptions } = JSON.parse(json);

/** Each begins its work, and gives how to tell when it has ended, and how to end it. */
const works = {
  idle: () => null,
  populate: () => allocate('metadata'),
  falloc: () => allocate('falloc'),
  stream,
  fallocate: () => ({
    ended: promisify(execFile)('fallocate', ['-n', '-l', String(statSync(file.filename).size), file.filename]),
    async cancel() {},
  }),
};

async function allocate(preallocation) {
  const image = await open({ qmp: guest.qmpSocket, device: 'disk0' });
  const job = image.allocate({ preallocation });
  return {
    ended: job.result,
    async cancel() {
      job.cancel();
      await job.result.catch((error) => {
        if (error.code !== 'CANCELLED') throw error;
      });
      await image.close();
    },
  };
}

async function stream() {
  const client = await QmpClient.connect(guest.qmpSocket);
  const job = await startStream(client, { device: 'disk' });
  return {
    ended: job.outcome,
    async cancel() {
      await job.cancel();
      const outcome = await job.outcome;
      if (outcome.status === 'failed') throw outcome.error;
      await client.close();
    },
  };
}

const guest = await startGuest({
  disks: [
    {
      id: 'disk0',
      file: file.filename,
      format: driver,
      cacheDirect: true,
      nodeName: 'disk',
      nodeOptions: { ...nodeOptions, file },
    },
  ],
});
try {
  await guest.waitReady();
  // The first writes take as long as it takes to translate the guest's code (TCG): up to 160 ms.
  await guest.ask('latency 1');
  const measured = guest.ask(`latency ${duration}`);
  await sleep(200);
  const begin = performance.now();
  const work = await works[mode]();
  let workSeconds = null;
  // How it failed, if it did, cancelling tells.
  work?.ended.then(() => (workSeconds = (performance.now() - begin) / 1000), () => undefined);
  const { count, failed, p50, p99, max } = await measured;
  if (failed > 0 || count === 0) throw new Error(`${failed} of ${count} writes failed`);
  // null where it went on for longer than the guest was measured.
  const sample = { seconds: p99 / 1e6, count, p50, p99, max, workSeconds };
  await work?.cancel();
  console.log(JSON.stringify(sample));
} finally {
  await guest.dispose();
}
process.exit();
