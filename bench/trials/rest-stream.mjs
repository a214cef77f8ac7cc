/** block-stream in the storage daemon that thicken starts, with the same nodes. */
import { Chain } from '../../build-modules/chain/chain.js';
import { Descriptor, READ_ONLY } from '../../build-modules/descriptor.js';
import { RestEngine } from '../../build-modules/qemu/rest-engine.js';
import { startStream } from '../../build-modules/qmp/block-jobs.js';

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
