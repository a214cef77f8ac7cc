/** Disks at rest: an overlay is made to stand alone. `--only copy,far,sparse` picks. */
import { execFileSync } from 'node:child_process';
import { rmSync, statfsSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { startNbdkit } from './lib/daemons.mjs';
import { isWanted, options } from './lib/options.mjs';
import { bareCopy, makeOverlay, makeTemplate, mustBePopulated } from './lib/overlay.mjs';
import { measure } from './lib/report.mjs';
import { MEMORY, withFilesystem } from './lib/storage.mjs';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const node = process.execPath;

const parts = { copy, far, sparse };

for (const [name, part] of Object.entries(parts)) {
  if (isWanted(name)) await part();
}

/**
 * Every byte of the template is data. On a disk that moves fewer bytes than QEMU could, every way of
 * copying takes what dd takes: which of them is the faster shows where the storage is memory, as with
 * NVMe disks.
 */
async function copy() {
  const size = options.quick ? 512 * MiB : 4 * GiB;
  const notes = [
    'The rivals bypass the page cache; block-stream runs in the daemon, with the nodes, that thicken starts.',
    'qemu-img convert writes another file, and needs the space of both.',
    'thicken ends with the image flushed, and its map read back.',
  ];
  const atRest = ['qemu-img rebase', 'qemu-img convert'].map((against) => limit(against, 1.2));
  await withTemplate(size, (setting) =>
    measure({
      name: 'offline-copy-disk',
      title: `at rest: ${size / GiB} GiB from a full local template`,
      rivals: [...rivalsFor(setting), bareCopy(setting)],
      limits: [...atRest, limit('dd, O_DIRECT, fsync', 1.25)],
      notes,
    }),
  );
  const inMemory = (setting) =>
    measure({
      name: 'offline-copy-memory',
      title: `at rest: ${size / GiB} GiB from a full template, all storage in memory`,
      rivals: [...rivalsFor(setting), bareCopy(setting)],
      limits: [...atRest, limit('block-stream', 1 / 1.3)],
      notes,
    });
  if (freeOf(MEMORY) > roomFor(size)) await withTemplate(size, inMemory, MEMORY);
  else console.log('offline-copy-memory: left out, since /dev/shm has no room for it');
}

function freeOf(folder) {
  const { bavail, bsize } = statfsSync(folder);
  return bavail * bsize;
}

/** For the template, the image and a copy of it, with their tables and the journal. */
function roomFor(size) {
  return 3.25 * size + 192 * MiB;
}

/** Each read of the template takes 5 ms more, as over a network. */
function far() {
  const size = options.quick ? 128 * MiB : GiB;
  return withTemplate(size, async (setting) => {
    const nbdkit = await startNbdkit(setting.folder, setting.template, 'delay', ['rdelay=5ms']);
    try {
      const away = { ...setting, backing: `nbd+unix:///?socket=${nbdkit.socket}` };
      await measure({
        name: 'offline-far-template',
        title: `at rest: ${size / GiB} GiB from a template 5 ms away`,
        rivals: rivalsFor(away),
      });
    } finally {
      await nbdkit.stop();
    }
  });
}

/** A template of one MiB of data in each eight: there is more to look at than to copy. */
function sparse() {
  const size = options.quick ? GiB : 8 * GiB;
  return withFilesystem('ext4', size / 2 + 256 * MiB, async (folder) => {
    const template = join(folder, 'template');
    writeFileSync(template, '');
    truncateSync(template, size);
    const offsets = Array.from({ length: size / (8 * MiB) }, (_, i) => `write -q -P ${(i % 250) + 1} ${i * 8}M 1M`);
    execFileSync('qemu-io', ['-f', 'raw', ...offsets.flatMap((text) => ['-c', text]), template]);
    const setting = { folder, template, backing: template, image: join(folder, 'image.qcow2'), size, zeros: true };
    await measure({
      name: 'offline-sparse',
      title: `at rest: ${size / GiB} GiB over a template with an eighth of it data`,
      rivals: rivalsFor(setting),
    });
  });
}

function withTemplate(size, body, home) {
  const filled = async (folder) => {
    const template = join(folder, 'template');
    makeTemplate(template, size);
    await body({ folder, template, backing: template, image: join(folder, 'image.qcow2'), size });
  };
  return withFilesystem('ext4', roomFor(size), filled, { home });
}

function rivalsFor({ folder, image, backing, size, zeros }) {
  const copied = join(folder, 'copy.qcow2');
  const around = {
    before: () => makeOverlay(image, backing, size),
    after: () => zeros || mustBePopulated(image, size),
  };
  const direct = ['-t', 'none', '-T', 'none'];
  return [
    { name: 'thicken library', command: node, args: ['bench/trials/rest.mjs', image], reports: true, ...around },
    { name: 'thicken, backing dropped', command: node, args: ['bench/trials/rest.mjs', image, 'drop'], reports: true, ...around },
    { name: 'block-stream', command: node, args: ['bench/trials/rest-stream.mjs', image], reports: true, ...around },
    { name: 'qemu-img rebase', command: 'qemu-img', args: ['rebase', '-f', 'qcow2', ...direct, '-b', '', image], ...around },
    {
      name: 'qemu-img convert',
      command: 'qemu-img',
      args: ['convert', '-f', 'qcow2', '-O', 'qcow2', ...direct, image, copied],
      before: () => {
        rmSync(copied, { force: true });
        makeOverlay(image, backing, size);
      },
      after: () => zeros || mustBePopulated(copied, size),
    },
  ];
}

function limit(against, atMost) {
  return { subject: 'thicken library', against, atMost };
}
