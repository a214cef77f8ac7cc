import { QmpClient } from 'thicken';
import { startStream } from '../../dist/qmp/block-jobs.js';

const [, , qmp] = process.argv;
const begin = performance.now();
const client = await QmpClient.connect(qmp);
const job = await startStream(client, { device: 'disk' });
const outcome = await job.outcome;
await client.close();
const seconds = (performance.now() - begin) / 1000;
if (outcome.status !== 'completed') throw new Error(`block-stream: ${JSON.stringify(outcome)}`);
console.log(JSON.stringify({ seconds, allocated: outcome.position }));
