/**
 * A foreign writer, which heeds no lock: opens PATH for writing and, until its input ends, writes
 * 4 KiB blocks of 0x5a here and there. Prints `open` once it has the file open, and in the end the
 * offsets that it wrote.
 */
import { openSync, writeSync } from 'node:fs';

const [, , path, size, seed] = process.argv;
const blocks = Math.floor(Number(size) / 4096);
const block = Buffer.alloc(4096, 0x5a);
const offsets = new Set();
let state = Number(seed);

const fd = openSync(path, 'r+');
process.stdout.write('open\n');

function write() {
  for (let i = 0; i < 64; i++) {
    state = (state * 1103515245 + 12345) % 2 ** 31;
    const offset = (state % blocks) * 4096;
    writeSync(fd, block, 0, 4096, offset);
    offsets.add(offset);
  }
  timer = setTimeout(write, 0);
}

let timer = setTimeout(write, 0);
process.stdin.on('end', () => {
  clearTimeout(timer);
  process.stdout.write(`${JSON.stringify([...offsets])}\n`);
}).resume();
