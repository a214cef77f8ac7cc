import { memoryAboveIdle } from './idle.mjs';
const { open } = await import('thicken');

const begin = performance.now();
const image = await open(process.argv[2], { format: process.argv[2].endsWith('.qcow2') ? 'qcow2' : 'raw' });
let count = 0;
for await (const page of image.extentPages()) count += page.offset.length;
await image.close();
const seconds = (performance.now() - begin) / 1000;
console.log(JSON.stringify({ seconds, count, rssMiB: memoryAboveIdle() }));
