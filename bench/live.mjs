/** Disks of a running QEMU: `--only populate,slow,guest,gaps` picks. */
import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { program } from './lib/build.mjs';
import { startNbdkit, startQemu } from './lib/daemons.mjs';
import { buildGuests } from './lib/guests.mjs';
import { options } from './lib/options.mjs';
import {
  asynchronousIo,
  bareCopy,
  fileNode,
  makeOverlay,
  makeTemplate,
  mustBePopulated,
  overlayNode,
} from './lib/overlay.mjs';
import { measure } from './lib/report.mjs';
import { MEMORY, withFilesystem } from './lib/storage.mjs';
import { median } from './lib/trials.mjs';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const node = process.execPath;

/** A disk that others use too has pauses of its own, longer than any that is measured here. */
const STORAGES = { disk: undefined, memory: MEMORY };

const parts = { populate, slow, guest, gaps };

for (const [name, part] of Object.entries(parts)) {
  if (options.only === undefined || options.only.includes(name)) await part();
}

/**
 * On a disk that moves fewer bytes than QEMU could, every way of copying takes what dd takes: which
 * of them is the faster shows where the storage is memory, as with NVMe disks.
 */
async function populate() {
  const size = options.quick ? 512 * MiB : 2 * GiB;
  const notes = (setting) => [
    `The disks bypass the page cache, with aio=${asynchronousIo(setting.template)}.`,
    'qemu-img rebase works at rest, with threads, and empties the backing entry.',
    'thicken ends with the image flushed; of the others only block-stream, fdatasync has its data on the disk.',
    'virsh asks every half second whether the job has ended.',
  ];
  const rivals = (setting) => [
    ...liveRivals(setting, fileNode(setting.template)),
    ...[blockpull(setting), rebase(setting), bareCopy(setting)],
  ];
  await withTemplate(size, (setting) =>
    measure({
      name: 'live-populate-disk',
      title: `populate: ${size / GiB} GiB from a template on the same disk, in a running QEMU`,
      rivals: rivals(setting),
      limits: [{ subject: 'thicken library', against: 'dd, O_DIRECT, fsync', atMost: 1.25 }],
      notes: notes(setting),
    }),
  );
  await withTemplate(
    size,
    (setting) =>
      measure({
        name: 'live-populate-memory',
        title: `populate: ${size / GiB} GiB, all storage in memory, in a running QEMU`,
        rivals: rivals(setting),
        limits: ['block-stream', 'block-stream, fdatasync'].map((against) => ({
          subject: 'thicken library',
          against,
          atMost: 1 / 1.3,
        })),
        notes: notes(setting),
      }),
    MEMORY,
  );
}

/** Each read of the template takes 5 ms more, as it does over a network or from a busy array. */
function slow() {
  const size = options.quick ? 128 * MiB : GiB;
  return withTemplate(size, async (setting) => {
    const nbdkit = await startNbdkit(setting.folder, setting.template, 'delay', ['rdelay=5ms']);
    try {
      const far = { ...setting, backing: `nbd+unix:///?socket=${nbdkit.socket}` };
      await measure({
        name: 'live-slow-template',
        title: `populate: ${size / GiB} GiB from a template 5 ms away, in a running QEMU`,
        rivals: [...liveRivals(far), rebase(far)],
        limits: [{ subject: 'thicken library', against: 'block-stream', atMost: 1 / 0.9 }],
      });
    } finally {
      await nbdkit.stop();
    }
  });
}

/** Guest writes all over an image that is being populated: most of them wait for the template too. */
async function guest() {
  buildGuests();
  for (const [storage, home] of Object.entries(STORAGES)) await guestPopulate(storage, home);
}

function guestPopulate(storage, home) {
  // More than can be copied at 20 MB/s while the guest is measured.
  const size = 256 * MiB;
  const body = async (setting) => {
    const { image, folder, template } = setting;
    const nbdkit = await startNbdkit(folder, template, 'rate', ['rate=160M']);
    const before = () => makeOverlay(image, `nbd+unix:///?socket=${nbdkit.socket}`, size);
    try {
      before();
      const disk = overlayNode(image);
      await measureGuest({
        name: `live-guest-populate-${storage}`,
        title: `p99 of a guest’s 4 KiB writes over a template at 20 MB/s, storage: ${storage}`,
        rivals: guestRivals(disk, 6, { idle: 'idle', populate: 'thicken populate', stream: 'block-stream' }, before),
      });
    } finally {
      await nbdkit.stop();
    }
  };
  return withTemplate(size, body, home);
}

/** Guest writes to a raw image with holes, while they are filled. */
async function gaps() {
  buildGuests();
  for (const [storage, home] of Object.entries(STORAGES)) await guestFalloc(storage, home);
}

function guestFalloc(storage, home) {
  const count = options.quick ? 10_000 : 100_000;
  const body = async (folder) => {
    const file = join(folder, 'disk.raw');
    const before = () => {
      rmSync(file, { force: true });
      execFileSync(program('make-fragmented'), [file, String(count), '4096', '4096']);
      execFileSync('sync');
    };
    before();
    const disk = { driver: 'raw', file: fileNode(file) };
    const names = { idle: 'idle', falloc: 'thicken falloc', fallocate: 'fallocate(1)' };
    await measureGuest({
      name: `live-guest-falloc-${storage}`,
      title: `p99 of a guest’s 4 KiB writes while ${count} gaps are filled, ext4, storage: ${storage}`,
      rivals: guestRivals(disk, 3, names, before),
    });
  };
  return withFilesystem('ext4', 2 * GiB, body, { home });
}

function guestRivals(disk, seconds, names, before) {
  return Object.entries(names).map(([mode, name]) => ({
    name,
    command: node,
    args: ['bench/trials/guest-latency.mjs', mode, JSON.stringify(disk), String(seconds)],
    reports: true,
    before,
  }));
}

async function measureGuest(benchmark) {
  const results = await measure(benchmark);
  for (const { name, samples } of results) {
    const [p50, p99, max] = ['p50', 'p99', 'max'].map((key) => median(samples.map((sample) => sample[key])) / 1000);
    console.log(`${name}: p50 ${p50.toFixed(2)} ms, p99 ${p99.toFixed(2)} ms, max ${max.toFixed(2)} ms`);
  }
}

function withTemplate(size, body, home) {
  // Room for the template and for the image, with its tables and the journal.
  const room = 2.25 * size + 128 * MiB;
  const filled = async (folder) => {
    const template = join(folder, 'template');
    makeTemplate(template, size);
    await body({ folder, template, backing: template, image: join(folder, 'image.qcow2'), size });
  };
  return withFilesystem('ext4', room, filled, { home });
}

/** Those that have a QEMU copy, which runs before they are timed. */
function liveRivals(setting, template) {
  const { folder, image, backing, size } = setting;
  let qemu;
  const around = {
    async before() {
      makeOverlay(image, backing, size);
      qemu = await startQemu(folder, overlayNode(image, template));
    },
    async after() {
      await qemu.stop();
      mustBePopulated(image, size);
    },
  };
  const qmp = join(folder, 'qmp');
  const args = ['allocate', '--qmp', qmp, '--device', 'disk0', '--preallocation', 'metadata'];
  const trial = (script, ...more) => ({
    command: node,
    args: [`bench/trials/${script}.mjs`, qmp, ...more],
    reports: true,
    ...around,
  });
  return [
    { name: 'thicken library', ...trial('populate') },
    {
      name: 'thicken command line',
      command: node,
      args: ['dist/cli/main.js', ...args, '--progress', 'none'],
      ...around,
    },
    { name: 'block-stream', ...trial('block-stream') },
    { name: 'block-stream, fdatasync', ...trial('block-stream', image) },
  ];
}

function blockpull({ image, backing, size }) {
  // A short path: libvirt puts sockets below it.
  const libvirt = mkdtempSync(join(tmpdir(), 'virsh-'));
  process.prependOnceListener('exit', () => dropLibvirt(libvirt));
  return {
    name: 'virsh blockpull',
    command: node,
    args: ['bench/trials/blockpull.mjs', image, asynchronousIo(backing), libvirt],
    reports: true,
    before: () => makeOverlay(image, backing, size),
    after: () => mustBePopulated(image, size),
  };
}

/** With what a trial that was cut short has left running. */
function dropLibvirt(folder) {
  const pidfile = join(folder, 'run/qemu/bench.pid');
  if (existsSync(pidfile)) spawnSync('kill', ['-9', readFileSync(pidfile, 'utf8').trim()], { stdio: 'ignore' });
  rmSync(folder, { recursive: true, force: true });
}

function rebase({ image, backing, size }) {
  return {
    name: 'qemu-img rebase',
    command: 'qemu-img',
    args: ['rebase', '-f', 'qcow2', '-t', 'none', '-T', 'none', '-b', '', image],
    before: () => makeOverlay(image, backing, size),
    after: () => mustBePopulated(image, size),
  };
}
