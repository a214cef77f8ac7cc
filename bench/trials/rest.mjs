import { memoryAboveIdle } from './idle.mjs';
const { open } = await import('thicken');

const [, , path, backing] = process.argv;
const begin = performance.now();
const image = await open(path, { format: 'qcow2' });
const dropBacking = backing === 'drop';
const result = await image.allocate({ preallocation: 'metadata', dropBacking }).result;
await image.close();
const seconds = (performance.now() - begin) / 1000;
if (result.verified !== true) throw new Error(`not verified: ${JSON.stringify(result)}`);
console.log(JSON.stringify({ seconds, allocated: result.allocated, rssMiB: memoryAboveIdle() }));
