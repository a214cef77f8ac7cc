/**
 * For a process with the sanitized addon: opens, scans, allocates, cancels and closes in a loop,
 * with closes and ends of threads in the midst of work. One argument: the folder for its file.
 */
import { closeSync, ftruncateSync, openSync, rmSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { Worker, isMainThread, workerData } from 'node:worker_threads';
import { open } from '../../dist/index.js';
import { native } from '../../dist/native.js';

const MiB = 2 ** 20;
const rounds = Number(process.env.ROUNDS ?? 60);
const size = 64 * MiB;

if (isMainThread) await main(process.argv[2]);
else await scanForever(workerData);

async function main(folder) {
  const file = join(folder, 'sanitized.raw');
  try {
    for (let round = 0; round < rounds; round++) await oneRound(file, round);
    for (let round = 0; round < 10; round++) await endOfThread(file, round);
    await badArguments();
  } finally {
    rmSync(file, { force: true });
  }
  process.stdout.write(`${rounds} rounds\n`);
}

async function oneRound(file, round) {
  makeFile(file, round);
  const image = await open(file, { format: 'raw' });
  let extents = 0;
  for await (const extent of image.extents()) extents += extent.length > 0 ? 1 : 0;
  if (extents === 0) throw new Error('no extents');
  const preallocation = round % 2 === 0 ? 'falloc' : 'full';
  const job = image.allocate({ preallocation });
  if (round % 3 === 1) job.cancel();
  if (round % 3 === 2) setImmediate(() => job.cancel());
  const scan = image.extents().next();
  // A third of the rounds closes under the running job and scan.
  const closing = round % 3 === 0 ? undefined : image.close();
  await Promise.allSettled([job.result, scan, closing]);
  await image.close();
}

function makeFile(file, round) {
  rmSync(file, { force: true });
  const fd = openSync(file, 'w+');
  ftruncateSync(fd, size + (round % 5) * 511);
  for (let at = 0; at < size; at += MiB) writeSync(fd, `data ${round}`, at + round * 17);
  closeSync(fd);
}

async function endOfThread(file, round) {
  makeFile(file, round);
  const worker = new Worker(new URL(import.meta.url), { workerData: file });
  const failed = new Promise((_, reject) => worker.once('error', reject));
  await Promise.race([new Promise((resolve) => worker.once('message', resolve)), failed]);
  await sleep(round * 3);
  await worker.terminate();
}

async function scanForever(file) {
  const { parentPort } = await import('node:worker_threads');
  const image = await open(file, { format: 'raw' });
  image.allocate({ preallocation: 'full', speed: 8 * MiB });
  parentPort.postMessage('begun');
  for (;;) for await (const extent of image.extents()) if (extent.length === 0) return;
}

/** What lib never passes must be an exception, not undefined behaviour. */
async function badArguments() {
  const addon = native();
  const calls = [
    () => addon.readExtents(),
    () => addon.readExtents(0, 9, 0, 1, 1),
    () => addon.readExtents(0, 0, -1, 1, 1),
    () => addon.readExtents(0, 0, 0, NaN, 1),
    () => addon.readExtents(0, 0, 1, 0, 1),
    () => addon.readExtents(0, 0, 0, 1, 0),
    () => addon.readExtents(0, 0, 0, 1, 1, {}),
    () => addon.fallocate(0, 2, new Float64Array(2)),
    () => addon.fallocate(0, 0, new Float64Array(3)),
    () => addon.fallocate(0, 0, new Float64Array([0.5, 1])),
    () => addon.fallocate(0, 0, [0, 1]),
    () => addon.zeroWrite(null, new Float64Array(0)),
    () => addon.zeroWrite({ granularity: 0 }, new Float64Array(0)),
    () => addon.takeLocks(0, 'x'),
    () => addon.takeLocks(0, [Infinity]),
    () => addon.probeWriter('x'),
    () => addon.allocateDevice(0, 0, 0, new Float64Array(0)),
    () => addon.syncFile(),
    () => addon.readExtents(-1, 0, 0, 4096, 1),
    () => addon.fileFacts(2 ** 31 - 1),
  ];
  for (const call of calls) {
    const outcome = await Promise.resolve()
      .then(call)
      .then(
        () => 'accepted',
        () => 'refused',
      );
    if (outcome !== 'refused') throw new Error(`accepted: ${call}`);
  }
}
