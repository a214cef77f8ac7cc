import { closeSync, fdatasyncSync, openSync } from 'node:fs';
import { startStream } from '../../build-modules/qmp/block-jobs.js';
import { QmpClient } from '../../build-modules/qmp/client.js';

const [, , qmp, synced] = process.argv;
const begin = performance.now();
const client = await QmpClient.connect(qmp);
const job = await startStream(client, { device: 'disk' });
const outcome = await job.outcome;
if (synced) sync(synced);
await client.close();
const seconds = (performance.now() - begin) / 1000;
if (outcome.status !== 'completed') throw new Error(`block-stream: ${JSON.stringify(outcome)}`);
console.log(JSON.stringify({ seconds, allocated: outcome.position }));

/** The data at least; the tables that QEMU still holds in memory are not in the file yet. */
function sync(path) {
  const file = openSync(path, 'r');
  fdatasyncSync(file);
  closeSync(file);
}
