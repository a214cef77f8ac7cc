/**
 * For a process with the sanitized addon: opens, scans, allocates, cancels and closes in a loop,
 * with closes and ends of threads in the midst of work. One argument: the folder for its file.
 */
import { execFileSync } from 'node:child_process';
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
  const image = join(folder, 'sanitized.qcow2');
  try {
    for (let round = 0; round < rounds; round++) await oneRound(file, round);
    for (let round = 0; round < 10; round++) await endOfThread(file, round);
    for (let round = 0; round < rounds; round++) await qcow2Round(image, round);
    for (let round = 0; round < 10; round++) await endOfThread(image, round);
    await badArguments();
  } finally {
    for (const made of [file, image]) rmSync(made, { force: true });
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

/** The same on a qcow2 image, whose native state is more than descriptors. */
async function qcow2Round(file, round) {
  makeFile(file, round);
  const image = await open(file);
  const preallocation = ['metadata', 'falloc', 'full'][round % 3];
  const job = image.allocate({ preallocation, ...(round % 2 && { speed: 64 * MiB }) });
  if (round % 4 === 1) job.cancel();
  if (round % 4 === 2) setTimeout(() => job.cancel(), round % 20);
  const scan = image.extents().next();
  const looks = [image.verify({ preallocation }), image.info()];
  const closing = round % 4 === 0 ? undefined : sleep(round % 30).then(() => image.close());
  await Promise.allSettled([job.result, scan, closing, ...looks]);
  await image.close();
}

function makeFile(file, round) {
  rmSync(file, { force: true });
  if (file.endsWith('.qcow2')) return makeQcow2(file, round);
  const fd = openSync(file, 'w+');
  ftruncateSync(fd, size + (round % 5) * 511);
  for (let at = 0; at < size; at += MiB) writeSync(fd, `data ${round}`, at + round * 17);
  closeSync(fd);
}

function makeQcow2(file, round) {
  const clusters = `cluster_size=${[512, 4096, 65_536][round % 3]}`;
  // QEMU's tools hang now and then under a sanitizer that was not made for their coroutines.
  const env = { ...process.env, LD_PRELOAD: '' };
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', clusters, file, String(size + (round % 5) * 512)], { env });
  execFileSync('qemu-io', ['-f', 'qcow2', '-c', `write -P ${1 + (round % 250)} ${round * 512} 1M`, file], { env });
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
  const image = await open(file, file.endsWith('.qcow2') ? {} : { format: 'raw' });
  image.allocate({ preallocation: 'full', speed: 8 * MiB });
  parentPort.postMessage('begun');
  for (;;) for await (const extent of image.extents()) if (extent.length === 0) return;
}

/** What lib never passes must be an exception, not undefined behaviour. */
async function badArguments() {
  const addon = native();
  const files = { fd: -1, method: 0, dataFd: -1, dataMethod: 0 };
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
    () => addon.openQcow2({}, 0),
    () => addon.openQcow2(new addon.Qcow2Session(), 0),
    () => addon.readQcow2(new addon.Qcow2Tables(), files, 0, 1, 1),
    () => addon.readQcow2(new addon.Qcow2Tables(), { ...files, method: 4 }, 0, 1, 1),
    () => addon.looksPreallocatedQcow2(new addon.Qcow2Tables(), 0, 0),
    () => addon.prepareQcow2(new addon.Qcow2Tables(), files, {}),
    () => addon.prepareQcow2(new addon.Qcow2Session(), files, { offset: 0, length: 1, level: 3, backingEnd: 0 }),
    () => addon.allocateQcow2(new addon.Qcow2Session(), {}, undefined, 0, 1),
    () => addon.finishQcow2(new addon.Qcow2Session(), { bufferedFd: 0, directFd: -1, directAlignment: 0, gate: {} }),
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
