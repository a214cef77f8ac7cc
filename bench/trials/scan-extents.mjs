import { memoryAboveIdle } from './idle.mjs';
const { open } = await import('thicken');

const begin = performance.now();
const image = await open(process.argv[2], { format: 'raw' });
let count = 0;
for await (const extent of image.extents()) if (extent.length > 0) count++;
await image.close();
const seconds = (performance.now() - begin) / 1000;
console.log(JSON.stringify({ seconds, count, rssMiB: memoryAboveIdle() }));
