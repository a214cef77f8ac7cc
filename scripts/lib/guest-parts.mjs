import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { inRoot } from './paths.mjs';
import { step } from './step.mjs';

/**
 * What test/support/guest-image.ts makes guests of: `vmlinuz`, `modules/`, `busybox`. Taken out of
 * Debian's packages: an installed kernel would rebuild the boot files of this machine, and
 * busybox-static would replace its busybox.
 */
export const guestParts = { current: haveParts, make: fetchParts };

const folder = inRoot('build-setup/guest-parts');
// The smallest of Debian's kernels.
const kernel = 'linux-image-cloud-amd64';
const drivers = ['virtio', 'block', 'char', 'scsi'];

/** Guests run under emulation, but their program is built by this machine's compiler. */
function haveParts() {
  return process.arch !== 'x64' || existsSync(folder);
}

function fetchParts() {
  const fresh = `${folder}.new`;
  rmSync(fresh, { recursive: true, force: true });
  mkdirSync(fresh, { recursive: true });
  download(fresh);
  for (const name of readdirSync(fresh)) {
    step(`guest: ${name}`, 'dpkg-deb', ['--extract', join(fresh, name), join(fresh, 'all')]);
    rmSync(join(fresh, name));
  }
  keepNeeded(fresh);
  renameSync(fresh, folder);
}

/** The package that `kernel`, which holds nothing itself, stands for. */
function newestKernel() {
  const { stdout } = spawnSync('apt-cache', ['depends', kernel], { encoding: 'utf8' });
  const name = /linux-image-\d\S*/.exec(stdout ?? '')?.[0];
  if (name === undefined) throw new Error(`apt-cache knows no package ${kernel}`);
  return name;
}

/** Lists that are old or missing are renewed only when they turn out to be, and by root. */
function download(cwd) {
  try {
    downloadOnce(cwd);
  } catch (cause) {
    if (process.geteuid() !== 0) {
      throw new Error(`${cause.message}; if the package lists are old, as root: apt-get update`, {
        cause,
      });
    }
    step('package lists', 'apt-get', ['-qq', 'update']);
    downloadOnce(cwd);
  }
}

function downloadOnce(cwd) {
  const args = ['-qq', 'download', newestKernel(), 'busybox-static'];
  step('packages for guests', 'apt-get', args, { cwd });
}

function keepNeeded(fresh) {
  const all = join(fresh, 'all');
  const boot = join(all, 'boot');
  const image = readdirSync(boot).find((name) => name.startsWith('vmlinuz-'));
  const modules = join(all, 'lib/modules', image.slice('vmlinuz-'.length), 'kernel/drivers');
  renameSync(join(boot, image), join(fresh, 'vmlinuz'));
  mkdirSync(join(fresh, 'modules'));
  for (const name of drivers) renameSync(join(modules, name), join(fresh, 'modules', name));
  renameSync(join(all, 'bin/busybox'), join(fresh, 'busybox'));
  rmSync(all, { recursive: true });
}
