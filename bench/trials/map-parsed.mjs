/** What a program does that has no library for it: it has qemu-img map write JSON, and reads that. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { memoryAboveIdle } from './idle.mjs';

const begin = performance.now();
const child = spawn('qemu-img', ['map', '--output=json', '-f', 'raw', process.argv[2]], {
  stdio: ['ignore', 'pipe', 'inherit'],
});
const closed = once(child, 'close');
const chunks = [];
for await (const chunk of child.stdout) chunks.push(chunk);
const [status] = await closed;
if (status !== 0) throw new Error(`qemu-img map ended with ${status}`);
const count = JSON.parse(Buffer.concat(chunks).toString('latin1')).length;
const seconds = (performance.now() - begin) / 1000;
console.log(JSON.stringify({ seconds, count, rssMiB: memoryAboveIdle() }));
