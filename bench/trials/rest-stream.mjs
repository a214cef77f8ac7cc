/** block-stream in the storage daemon that thicken starts, with the same nodes. */
import { Chain } from '../../dist/chain/chain.js';
import { Descriptor, READ_ONLY } from '../../dist/descriptor.js';
import { RestEngine } from '../../dist/qemu/rest-engine.js';
import { startStream } from '../../dist/qmp/block-jobs.js';

const [, , path] = process.argv;
const begin = performance.now();
const file = await Descriptor.open(path, READ_ONLY);
const chain = await Chain.open(file, 'qcow2');
const engine = await RestEngine.work(chain);
const job = await startStream(engine.daemon.qmp, { device: 'layer0' });
const outcome = await job.outcome;
await engine[Symbol.asyncDispose]();
await chain[Symbol.asyncDispose]();
await file.close();
const seconds = (performance.now() - begin) / 1000;
if (outcome.status !== 'completed') throw new Error(`block-stream: ${JSON.stringify(outcome)}`);
console.log(JSON.stringify({ seconds, allocated: outcome.position }));
