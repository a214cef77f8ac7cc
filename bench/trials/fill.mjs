import { closeSync, openSync, rmSync, truncateSync, writeSync } from 'node:fs';
import { memoryAboveIdle } from './idle.mjs';
const { open } = await import('thicken');

const [, , path, preallocation, warm] = process.argv;
if (warm === 'warm') await warmUp(`${path}.warm`);
const begin = performance.now();
const image = await open(path, { format: 'raw' });
const result = await image.allocate({ preallocation }).result;
await image.close();
const seconds = (performance.now() - begin) / 1000;
if (result.verified !== true) throw new Error(`not verified: ${JSON.stringify(result)}`);
console.log(JSON.stringify({ seconds, allocated: result.allocated, rssMiB: memoryAboveIdle() }));

/** A process that has allocated before, as a control plane has, runs compiled code. */
async function warmUp(small) {
  for (let i = 0; i < 20; i++) {
    const fd = openSync(small, 'w');
    for (let at = 0; at < 512; at++) writeSync(fd, 'x', at * 65_536);
    closeSync(fd);
    truncateSync(small, 512 * 65_536);
    const image = await open(small, { format: 'raw' });
    await image.allocate({ preallocation }).result;
    await image.close();
    rmSync(small);
  }
}
