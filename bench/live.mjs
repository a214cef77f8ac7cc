/** Disks of a running QEMU: `--only populate,slow,guest,gaps` picks. */
import { join } from 'node:path';
import { startNbdkit, startQemu } from './lib/daemons.mjs';
import { options } from './lib/options.mjs';
import { asynchronousIo, fileNode, makeOverlay, makeTemplate, mustBePopulated, nbdNode, overlayNode } from './lib/overlay.mjs';
import { measure } from './lib/report.mjs';
import { withFilesystem } from './lib/storage.mjs';

const MiB = 2 ** 20;
const GiB = 2 ** 30;
const node = process.execPath;

const parts = { populate, slow };

for (const [name, part] of Object.entries(parts)) {
  if (options.only === undefined || options.only.includes(name)) await part();
}

function populate() {
  const size = options.quick ? 512 * MiB : 2 * GiB;
  return withTemplate(size, (setting) =>
    measure({
      name: 'live-populate',
      title: `populate: ${size / GiB} GiB from a local template, in a running QEMU`,
      rivals: [...liveRivals(setting, fileNode(setting.template)), blockpull(setting), rebase(setting)],
      limits: ['thicken library', 'thicken command line'].map((subject) => ({
        subject,
        against: 'block-stream',
        atMost: 1 / 1.3,
      })),
      notes: [
        `The disks bypass the page cache, with aio=${asynchronousIo(setting.template)}.`,
        'qemu-img rebase works at rest, with threads, and empties the backing entry.',
        'virsh asks every half second whether the job has ended.',
      ],
    }),
  );
}

/** Each read of the template takes 5 ms more, as it does over a network or from a busy array. */
function slow() {
  const size = options.quick ? 128 * MiB : GiB;
  return withTemplate(size, async (setting) => {
    const nbdkit = startNbdkit(setting.folder, setting.template, 'delay', ['rdelay=5ms']);
    try {
      const far = { ...setting, backing: `nbd+unix:///?socket=${nbdkit.socket}` };
      await measure({
        name: 'live-slow-template',
        title: `populate: ${size / GiB} GiB from a template 5 ms away, in a running QEMU`,
        rivals: [...liveRivals(far, nbdNode(nbdkit.socket)), rebase(far)],
        limits: [{ subject: 'thicken library', against: 'block-stream', atMost: 1 / 0.9 }],
      });
    } finally {
      await nbdkit.stop();
    }
  });
}

function withTemplate(size, body) {
  // Room for the template and for the image, with its tables and the journal.
  return withFilesystem('ext4', 2.25 * size + 128 * MiB, async (folder) => {
    const template = join(folder, 'template');
    makeTemplate(template, size);
    await body({ folder, template, backing: template, image: join(folder, 'image.qcow2'), size });
  });
}

/** Those that have a QEMU copy, which runs before they are timed. */
function liveRivals(setting, template) {
  const { folder, image, backing, size } = setting;
  let qemu;
  const around = {
    before() {
      makeOverlay(image, backing, size);
      qemu = startQemu(folder, overlayNode(image, template));
    },
    async after() {
      await qemu.stop();
      mustBePopulated(image, size);
    },
  };
  const qmp = join(folder, 'qmp');
  const args = ['allocate', '--qmp', qmp, '--device', 'disk0', '--preallocation', 'metadata'];
  const trial = (script) => ({ command: node, args: [`bench/trials/${script}.mjs`, qmp], reports: true, ...around });
  return [
    { name: 'thicken library', ...trial('populate') },
    { name: 'thicken command line', command: node, args: ['dist/cli/main.js', ...args, '--progress', 'none'], ...around },
    { name: 'block-stream', ...trial('block-stream') },
  ];
}

function blockpull({ image, backing, size }) {
  return {
    name: 'virsh blockpull',
    command: node,
    args: ['bench/trials/blockpull.mjs', image, asynchronousIo(backing)],
    reports: true,
    before: () => makeOverlay(image, backing, size),
    after: () => mustBePopulated(image, size),
  };
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
