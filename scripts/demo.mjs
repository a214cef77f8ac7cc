#!/usr/bin/env node
/**
 * The main job on a real image: makes a sparse ext4 disk image filled from files of this machine,
 * thickens it with the command line, and lets other programs judge the outcome. Needs no root.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  copyFileSync,
  createReadStream,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  statSync,
  statfsSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { constants, tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { pipeline } from 'node:stream/promises';
import { inRoot } from './lib/paths.mjs';
import { setup } from './lib/setup.mjs';
import { addSystemFolders } from './lib/tools.mjs';

const MiB = 2 ** 20;
const imageSize = 1024 * MiB;
const contentSize = 60 * MiB;
const contentFrom = ['/usr/include', '/usr/share/doc', '/usr/share/perl', '/etc'];
const cli = inRoot('dist/cli/main.js');
const environment = { ...process.env, PATH: addSystemFolders() };

let folder;
let running;

async function main() {
  try {
    setup('demo');
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, stop);
    folder = mkdtempSync(join(tmpdir(), 'thicken-demo-'));
    return (await demonstrate()) ? 0 : 1;
  } catch (error) {
    process.stderr.write(`demo: ${error.message}\n`);
    return 1;
  } finally {
    removeFolder();
  }
}

function removeFolder() {
  if (folder) rmSync(folder, { recursive: true, force: true });
}

function stop(signal) {
  running?.kill('SIGKILL');
  removeFolder();
  process.exit(128 + constants.signals[signal]);
}

async function demonstrate() {
  const image = join(folder, 'disk.raw');
  await makeImage(image);
  const before = await facts(image);

  await thicken('info', image);
  await thicken('map', image, '--output', 'bar');
  await thicken('allocate', image);
  await thicken('map', image, '--output', 'bar');
  await run(process.execPath, [cli, 'verify', image], {
    shown: `thicken verify ${image}`,
    // 3: not satisfied, which is the honest answer where the next overwrite takes new blocks.
    accepts: copiesOnWrite() ? [0, 3] : [0],
  });
  await run('e2fsck', ['-fn', image]);

  const after = await facts(image);
  return summarize(before, after);
}

async function makeImage(image) {
  const content = join(folder, 'content');
  mkdirSync(content);
  const { files, bytes } = collect(content);
  say(`A disk image of ${size(imageSize)} with ${files} files of this machine, ${size(bytes)}:`);
  writeFileSync(image, '');
  truncateSync(image, imageSize);
  await run('mkfs.ext4', ['-q', '-F', '-L', 'demo', '-d', content, image]);
  rmSync(content, { recursive: true });
}

/** Copies files until there are enough of them, in the order of their names. */
function collect(target) {
  const taken = { files: 0, bytes: 0 };
  for (const path of contentFrom.flatMap((start) => [...filesUnder(start)])) {
    const { size: bytes } = lstatSync(path);
    if (taken.bytes + bytes > contentSize) continue;
    try {
      const copy = join(target, path);
      mkdirSync(dirname(copy), { recursive: true });
      copyFileSync(path, copy);
    } catch (error) {
      // What this user may not read is left out.
      if (error.code === 'EACCES' || error.code === 'EPERM') continue;
      throw error;
    }
    taken.files++;
    taken.bytes += bytes;
  }
  return taken;
}

function* filesUnder(path) {
  let entries;
  try {
    entries = readdirSync(path, { withFileTypes: true });
  } catch {
    return;
  }
  for (const entry of entries.sort((a, b) => (a.name < b.name ? -1 : 1))) {
    const inner = join(path, entry.name);
    if (entry.isDirectory()) yield* filesUnder(inner);
    else if (entry.isFile()) yield inner;
  }
}

async function facts(image) {
  const hash = createHash('sha256');
  await pipeline(createReadStream(image), hash);
  return { allocated: statSync(image).blocks * 512, sha256: hash.digest('hex') };
}

function thicken(...args) {
  return run(process.execPath, [cli, ...args], { shown: `thicken ${args.join(' ')}` });
}

function copiesOnWrite() {
  const btrfs = 0x9123683e;
  return statfsSync(folder).type === btrfs;
}

function run(command, args, { shown = `${command} ${args.join(' ')}`, accepts = [0] } = {}) {
  say(`\n$ ${shown}`);
  return new Promise((resolve, reject) => {
    running = spawn(command, args, { stdio: 'inherit', env: environment });
    running.once('error', reject);
    running.once('exit', (status, signal) => {
      running = undefined;
      if (accepts.includes(status)) resolve();
      else reject(new Error(`${shown}: ${signal ?? `exit status ${status}`}`));
    });
  });
}

function summarize(before, after) {
  const same = before.sha256 === after.sha256;
  const complete = after.allocated >= imageSize;
  say('');
  say(`               before       after`);
  say(`allocated      ${column(size(before.allocated))}${size(after.allocated)}`);
  say(`missing        ${column(size(missing(before)))}${size(missing(after))}`);
  say(`sha256         ${column(before.sha256.slice(0, 8))}${after.sha256.slice(0, 8)}`);
  say('');
  if (!same) say('The content CHANGED.');
  if (!complete) say('The image is NOT fully allocated.');
  if (same && complete) say('Fully allocated, every byte as it was, and the file system is clean.');
  return same && complete;
}

const missing = ({ allocated }) => Math.max(0, imageSize - allocated);
const column = (text) => text.padEnd(13);
const size = (bytes) => `${(bytes / MiB).toFixed(1)} MiB`;

function say(line) {
  process.stdout.write(`${line}\n`);
}

process.exitCode = await main();
