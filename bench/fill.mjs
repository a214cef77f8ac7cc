import { execFileSync } from 'node:child_process';
import { rmSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { program } from './lib/build.mjs';
import { isWanted, options } from './lib/options.mjs';
import { measure } from './lib/report.mjs';
import { withFilesystem } from './lib/storage.mjs';

const KiB = 2 ** 10;
const MiB = 2 ** 20;
const GiB = 2 ** 30;
const size = options.quick ? GiB : 8 * GiB;
const shapes = [
  { name: 'large-holes', title: '24 MiB holes', data: 8 * MiB, hole: 24 * MiB },
  { name: 'small-holes', title: '192 KiB holes', data: 64 * KiB, hole: 192 * KiB },
];

const limits = {
  falloc: ['thicken library', 'thicken library, warm'].flatMap((subject) =>
    ['C loop', 'C loop, fsync'].map((against) => ({ subject, against, atMost: 1.25 })),
  ),
  full: ['C loop, O_DIRECT, fsync', 'dd per hole'].map((against) => ({
    subject: 'thicken library',
    against,
    atMost: 1 / 0.9,
  })),
};
// Those that are timed as a whole process are compared with the command line.
const neverBehind = ['qemu-img convert', 'cp --sparse=never'].map((against) => ({
  subject: 'thicken command line',
  against,
  atMost: 1,
}));

for (const type of ['ext4', 'xfs']) {
  // Room for the file, fully allocated, and for a rival's copy of it.
  await withFilesystem(type, 2.25 * size, async (folder) => {
    for (const shape of shapes) {
      for (const level of ['falloc', 'full']) await fill(type, folder, shape, level);
    }
  });
}

async function fill(type, folder, shape, level) {
  const name = `fill-${type}-${shape.name}-${level}`;
  if (!isWanted(name)) return;
  const file = join(folder, 'file');
  const copy = join(folder, 'copy');
  const remake = () => {
    for (const old of [file, copy]) rmSync(old, { force: true });
    make(file, shape);
  };
  const rivals = level === 'falloc' ? fallocRivals(file, copy) : fullRivals(file, copy, shape);
  await measure({
    name,
    title: `${level}: filling the holes of ${size / GiB} GiB (${shape.title}), ${type}`,
    rivals: rivals.map((rival) => ({
      ...rival,
      before: remake,
      after: () => mustBeAllocated(rival.makes ?? file),
    })),
    limits: [...limits[level], ...(level === 'full' ? neverBehind : [])],
    notes: [
      'All but the plain C loop end with the file synced: done means durable.',
      ...(level === 'full' && !worthDd(shape)
        ? [`dd per hole is left out: it would take ${size / (shape.data + shape.hole)} processes.`]
        : []),
    ],
  });
}

function make(file, { data, hole }) {
  const args = [size / (data + hole), data, hole].map(String);
  execFileSync(program('make-fragmented'), [file, ...args]);
  // What the file before this one left to be done must not be charged to the trial.
  execFileSync('sync');
}

function mustBeAllocated(file) {
  const allocated = statSync(file).blocks * 512;
  if (allocated < size) throw new Error(`${file}: only ${allocated} of ${size} bytes are allocated`);
}

function thicken(file, level) {
  const node = process.execPath;
  const args = ['allocate', file, '--format', 'raw', '--preallocation', level, '--progress', 'none'];
  return [
    { name: 'thicken library', command: node, args: ['bench/trials/fill.mjs', file, level], reports: true },
    { name: 'thicken library, warm', command: node, args: ['bench/trials/fill.mjs', file, level, 'warm'], reports: true },
    { name: 'thicken command line', command: node, args: ['dist/cli/main.js', ...args] },
  ];
}

function fallocRivals(file, copy) {
  return [
    ...thicken(file, 'falloc'),
    { name: 'C loop', command: program('fill-falloc'), args: [file], reports: true, note: 'no fsync' },
    { name: 'C loop, fsync', command: program('fill-falloc'), args: [file, '--fsync'], reports: true },
    { name: 'fallocate(1)', ...synced(`fallocate -n -l ${size} "$1"`, file) },
    convert(file, copy, 'falloc'),
  ];
}

function fullRivals(file, copy, shape) {
  const direct = program('fill-direct');
  const cp = 'cp --sparse=never --reflink=never "$2" "$1"';
  return [
    ...thicken(file, 'full'),
    { name: 'C loop, O_DIRECT, fsync', command: direct, args: [file, '--fsync'], reports: true },
    ...(worthDd(shape) ? [{ name: 'dd per hole', ...synced(ddLoop(shape), file) }] : []),
    convert(file, copy, 'full'),
    // On xfs, cp would clone the file, holes and all, in spite of --sparse=never.
    { name: 'cp --sparse=never', makes: copy, ...synced(cp, copy, file) },
  ];
}

function convert(file, copy, level) {
  const script = `qemu-img convert -f raw -O raw -o preallocation=${level} "$2" "$1"`;
  return { name: 'qemu-img convert', makes: copy, ...synced(script, copy, file) };
}

/** A shell script whose $1 is the file that is made thick, and synced in the end. */
function synced(script, ...args) {
  return { command: 'sh', args: ['-ec', `${script}; sync "$1"`, 'sh', ...args] };
}

function worthDd({ hole }) {
  return hole >= 8 * MiB;
}

function ddLoop({ data, hole }) {
  const [step, first, count] = [data + hole, data, hole].map((bytes) => bytes / (8 * MiB));
  const dd = `dd if=/dev/zero of="$1" bs=8M seek=$at count=${count} oflag=direct conv=notrunc status=none`;
  return `at=${first}; while [ $at -lt ${size / (8 * MiB)} ]; do ${dd}; at=$((at + ${step})); done`;
}
