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
const large = { name: 'large-holes', size, title: '24 MiB holes', data: 8 * MiB, hole: 24 * MiB };
const small = { name: 'small-holes', size, title: '192 KiB holes', data: 64 * KiB, hole: 192 * KiB };
/** A disk as large as most: reserved space is not written, so that its size costs nothing here. */
const scattered = {
  name: 'scattered',
  size: options.quick ? 10 * GiB : 100 * GiB,
  title: 'an extent every 10 MiB',
  data: 64 * KiB,
  hole: 10 * MiB - 64 * KiB,
};
/** `few-holes` has no limit: 5 ms of work are less than what any call costs once, and that is shown. */
const fills = [
  { level: 'falloc', shape: scattered },
  { level: 'falloc', shape: small },
  { level: 'falloc', shape: { ...large, name: 'few-holes' }, unlimited: true },
  { level: 'full', shape: large },
  { level: 'full', shape: small },
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
  for (const what of fills) {
    const name = `fill-${type}-${what.shape.name}-${what.level}`;
    if (!isWanted(name)) continue;
    // Room for the file, fully allocated, and for a rival's copy of it.
    const room = 2.25 * what.shape.size;
    await withFilesystem(type, room, (folder) => fill({ ...what, type, name, folder }), {
      sparse: what.shape === scattered,
    });
  }
}

async function fill({ type, name, folder, shape, level, unlimited = false }) {
  const file = join(folder, 'file');
  const copy = join(folder, 'copy');
  const remake = () => {
    for (const old of [file, copy]) rmSync(old, { force: true });
    make(file, shape);
  };
  const rivals = level === 'falloc' ? fallocRivals(file, copy, shape) : fullRivals(file, copy, shape);
  await measure({
    name,
    title: `${level}: filling the holes of ${shape.size / GiB} GiB (${shape.title}), ${type}`,
    rivals: rivals.map((rival) => ({
      ...rival,
      before: remake,
      after: () => mustBeAllocated(rival.makes ?? file, shape),
    })),
    limits: unlimited ? [] : [...limits[level], ...(level === 'full' ? neverBehind : [])],
    notes: [
      'All but the plain C loop end with the file synced: done means durable.',
      ...(level === 'full' && !worthDd(shape)
        ? [`dd per hole is left out: it would take ${extentsOf(shape)} processes.`]
        : []),
    ],
  });
}

function make(file, shape) {
  const args = [extentsOf(shape), shape.data, shape.hole].map(String);
  execFileSync(program('make-fragmented'), [file, ...args]);
  // What the file before this one left to be done must not be charged to the trial.
  execFileSync('sync');
}

function extentsOf({ size, data, hole }) {
  return size / (data + hole);
}

function mustBeAllocated(file, { size }) {
  const allocated = statSync(file).blocks * 512;
  if (allocated < size) throw new Error(`${file}: only ${allocated} of ${size} bytes are allocated`);
}

function thicken(file, level) {
  const node = process.execPath;
  const args = ['allocate', file, '--format', 'raw', '--preallocation', level, '--progress', 'none'];
  return [
    { name: 'thicken library', command: node, args: ['bench/trials/fill.mjs', file, level], reports: true },
    { name: 'thicken command line', command: node, args: ['dist/cli/main.js', ...args] },
  ];
}

function fallocRivals(file, copy, { size }) {
  return [
    ...thicken(file, 'falloc'),
    {
      name: 'thicken library, warm',
      command: process.execPath,
      args: ['bench/trials/fill.mjs', file, 'falloc', 'warm'],
      reports: true,
    },
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

function ddLoop({ size, data, hole }) {
  const [step, first, count] = [data + hole, data, hole].map((bytes) => bytes / (8 * MiB));
  const dd = `dd if=/dev/zero of="$1" bs=8M seek=$at count=${count} oflag=direct conv=notrunc status=none`;
  return `at=${first}; while [ $at -lt ${size / (8 * MiB)} ]; do ${dd}; at=$((at + ${step})); done`;
}
