import { execFileSync } from 'node:child_process';
import { truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { program } from './lib/build.mjs';
import { isWanted, options } from './lib/options.mjs';
import { measure } from './lib/report.mjs';
import { withFilesystem } from './lib/storage.mjs';

const GiB = 2 ** 30;
const KiB = 2 ** 10;

const limits = [
  { subject: 'thicken extentPages', against: 'C FIEMAP loop', atMost: 1.25 },
  { subject: 'thicken extents', against: 'C FIEMAP loop', atMost: 3 },
  { subject: 'thicken extentPages', against: 'qemu-img map', atMost: 1 / 15 },
  { subject: 'thicken extents', against: 'qemu-img map', atMost: 1 / 8 },
];

const shapes = options.quick
  ? [fragmented('16 Ki', 16 * KiB), empty()]
  : [fragmented('128 Ki', 128 * KiB), fragmented('1 Mi', 1024 * KiB), empty()];

for (const type of ['ext4', 'xfs']) {
  await withFilesystem(type, options.quick ? GiB : 6 * GiB, async (folder) => {
    for (const shape of shapes.filter(({ name }) => isWanted(`scan-${type}-${name}`))) {
      const file = join(folder, 'file');
      shape.make(file);
      await measure({
        name: `scan-${type}-${shape.name}`,
        title: `Scan of ${shape.title}, ${type}`,
        rivals: rivals(file),
        limits: shape.limits,
      });
    }
  });
}

function fragmented(label, extents) {
  const args = [extents, 4 * KiB, 4 * KiB].map(String);
  return {
    name: label.replace(' ', ''),
    title: `${label} extents of 4 KiB with 4 KiB holes`,
    make: (file) => execFileSync(program('make-fragmented'), [file, ...args]),
    // The limits were set for 1 Mi extents; below that the start of a scan weighs too much.
    limits: extents >= 1024 * KiB ? limits : [],
  };
}

function empty() {
  const make = (file) => {
    writeFileSync(file, '');
    truncateSync(file, 1024 * GiB);
  };
  return { name: 'empty', title: 'an empty 1 TiB file', make, limits: [] };
}

/** Its own call: EXT4_IOC_GET_ES_CACHE of what is in memory, and XFS_IOC_GETBMAPX. */
function rivals(file) {
  const library = (script) => ({
    command: process.execPath,
    args: [`bench/trials/${script}.mjs`, file],
    reports: true,
  });
  return [
    { name: 'thicken extentPages', ...library('scan-pages') },
    { name: 'thicken extents', ...library('scan-extents') },
    { name: 'C FIEMAP loop', command: program('fiemap-loop'), args: [file], reports: true },
    { name: 'C loop of its own call', command: program('own-loop'), args: [file], reports: true },
    { name: 'C SEEK_HOLE loop', command: program('seek-loop'), args: [file], reports: true },
    { name: 'filefrag -v', command: 'filefrag', args: ['-v', file] },
    { name: 'qemu-img map', command: 'qemu-img', args: ['map', '--output=json', '-f', 'raw', file] },
  ];
}
