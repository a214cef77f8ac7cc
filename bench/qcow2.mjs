/** qcow2 images at rest: allocation in place beside the ways that QEMU has, and the map. */
import { execFileSync } from 'node:child_process';
import { rmSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { program } from './lib/build.mjs';
import { startStorageDaemon } from './lib/daemons.mjs';
import { isWanted, options } from './lib/options.mjs';
import { measure } from './lib/report.mjs';
import { withFilesystem } from './lib/storage.mjs';

const { quick } = options;
const KiB = 2 ** 10;
const MiB = 2 ** 20;
const GiB = 2 ** 30;
const node = process.execPath;

// Blocks that are reserved and not written take no space in a sparse backing file.
await withFilesystem('ext4', quick ? 24 * GiB : 220 * GiB, falloc, { sparse: true });
await withFilesystem('xfs', 8 * GiB, metadata, { sparse: true });
await withFilesystem('ext4', quick ? 3 * GiB : 20 * GiB, full);
await withFilesystem('ext4', quick ? 2 * GiB : 8 * GiB, map);

async function falloc(folder) {
  const name = 'qcow2-falloc';
  if (!isWanted(name)) return;
  const size = quick ? 10 * GiB : 100 * GiB;
  const touched = size / 10;
  const [file, copy] = [join(folder, 'image.qcow2'), join(folder, 'copy.qcow2')];
  const remake = (bytes) => () => {
    remove(file, copy);
    create(file, bytes);
  };
  await measure({
    name,
    title: `falloc: ${size / GiB} GiB thin qcow2, 64 KiB clusters, ext4`,
    rivals: [
      { ...thicken('falloc', file), before: remake(size), after: () => mustHold(file, size) },
      { ...commandLine('falloc', file), before: remake(size), after: () => mustHold(file, size) },
      touching(file, folder, touched, size / touched, remake(touched)),
      {
        name: 'qemu-img convert',
        ...synced('qemu-img convert -f qcow2 -O qcow2 -o preallocation=falloc "$2" "$1"', copy, file),
        before: remake(size),
        after: () => mustHold(copy, size),
      },
    ],
    limits: [
      // The touched image is a tenth as large.
      { subject: 'thicken library', against: `touching ${touched / GiB} GiB`, atMost: 10 / 100 },
      { subject: 'thicken library', against: 'qemu-img convert', atMost: 1 / 3 },
    ],
    notes: [`Touching is timed on ${touched / GiB} GiB: for ${size / GiB} GiB it takes ten times as long.`],
  });
}

/** Two clusters a write, 16 writes in flight: QEMU's own way to map what is not mapped. */
function touching(file, folder, bytes, times, remake) {
  let daemon;
  const uri = `nbd+unix:///disk?socket=${join(folder, 'nbd')}`;
  const bench = ['bench', '-w', '-q', '-f', 'raw', '-d', '16', '-s', String(KiB), '-S', String(128 * KiB)];
  return {
    name: `touching ${bytes / GiB} GiB`,
    note: `× ${times} for the whole`,
    command: 'qemu-img',
    args: [...bench, '-o', String(64 * KiB - 512), '-c', String(bytes / (128 * KiB)), uri],
    async before() {
      remake();
      const protocol = { driver: 'file', filename: file, 'cache': { direct: true } };
      daemon = await startStorageDaemon(folder, { driver: 'qcow2', 'node-name': 'disk', file: protocol });
    },
    async after() {
      await daemon.stop();
      mustHold(file, bytes);
    },
  };
}

async function metadata(folder) {
  const name = 'qcow2-metadata';
  if (!isWanted(name)) return;
  const size = quick ? 100 * GiB : 1024 * GiB;
  const file = join(folder, 'image.qcow2');
  const remake = () => {
    remove(file);
    create(file, size);
  };
  const mustBeMapped = () => {
    if (statSync(file).size < size) throw new Error(`${file} is too short`);
  };
  const results = await measure({
    name,
    title: `metadata: ${size / GiB} GiB thin qcow2, 64 KiB clusters, xfs`,
    rivals: [
      { ...thicken('metadata', file), before: remake, after: mustBeMapped },
      {
        name: 'qemu-img create',
        ...synced(`qemu-img create -q -f qcow2 -o preallocation=metadata "$1" ${size}`, file),
        before: () => remove(file),
        after: mustBeMapped,
      },
    ],
    limits: [{ subject: 'thicken library', against: 'qemu-img create', atMost: 1 }],
    notes: ['1 TiB is to take less than 10 s, and 200 MiB of memory.'],
  });
  const own = results.find((result) => result.name === 'thicken library');
  if (own && (own.median >= 10 || own.rssMiB >= 200)) process.exitCode = options.check ? 1 : 0;
}

async function full(folder) {
  const name = 'qcow2-full';
  if (!isWanted(name)) return;
  const size = quick ? GiB : 8 * GiB;
  const [file, raw] = [join(folder, 'image.qcow2'), join(folder, 'image.raw')];
  const before = () => {
    remove(file, raw);
    create(file, size);
    writeFileSync(raw, '');
    truncateSync(raw, size);
    execFileSync('sync');
  };
  await measure({
    name,
    title: `full: ${size / GiB} GiB thin, ext4`,
    rivals: [
      { ...thicken('full', file), before, after: () => mustHold(file, size) },
      {
        name: 'thicken library, raw',
        command: node,
        args: ['bench/trials/fill.mjs', raw, 'full'],
        reports: true,
        before,
        after: () => mustHold(raw, size),
      },
    ],
    limits: [{ subject: 'thicken library', against: 'thicken library, raw', atMost: 1 / 0.9 }],
  });
}

async function map(folder) {
  const name = 'qcow2-map';
  if (!isWanted(name)) return;
  const extents = quick ? 2 ** 16 : 2 ** 20;
  const [file, raw] = [join(folder, 'image.qcow2'), join(folder, 'raw')];
  execFileSync(program('make-fragmented'), [raw, String(extents / 2), String(4 * KiB), String(4 * KiB)]);
  execFileSync('qemu-img', ['convert', '-S', '4k', '-f', 'raw', '-O', 'qcow2', '-o', 'cluster_size=4k', raw, file]);
  remove(raw);
  await measure({
    name,
    title: `map: qcow2 of ${extents} extents, ext4`,
    rivals: [
      { name: 'thicken library', command: node, args: ['bench/trials/scan-pages.mjs', file], reports: true },
      { name: 'thicken map --json', command: node, args: ['dist/cli/main.js', 'map', '--json', file] },
      { name: 'qemu-img map', command: 'qemu-img', args: ['map', '-f', 'qcow2', '--output=json', file] },
    ],
    limits: [
      { subject: 'thicken library', against: 'qemu-img map', atMost: 1 / 10 },
      { subject: 'thicken map --json', against: 'qemu-img map', atMost: 1 },
    ],
  });
}

function create(file, size) {
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', file, String(size)]);
  execFileSync('sync', [file]);
}

function remove(...files) {
  for (const file of files) rmSync(file, { force: true });
}

function mustHold(file, size) {
  const allocated = statSync(file).blocks * 512;
  if (allocated < size) throw new Error(`${file}: only ${allocated} of ${size} bytes are allocated`);
}

function thicken(level, file) {
  return { name: 'thicken library', command: node, args: ['bench/trials/qcow2.mjs', file, level], reports: true };
}

function commandLine(level, file) {
  const args = ['allocate', file, '--preallocation', level, '--progress', 'none'];
  return { name: 'thicken command line', command: node, args: ['dist/cli/main.js', ...args] };
}

/** A shell script whose $1 is the file that is made, and synced in the end. */
function synced(script, ...args) {
  return { command: 'sh', args: ['-ec', `${script}; sync "$1"`, 'sh', ...args] };
}
