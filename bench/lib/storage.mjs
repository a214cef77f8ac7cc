import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, statfsSync } from 'node:fs';
import { basename, join } from 'node:path';

const mkfs = {
  // No discard: it would punch out what was preallocated beneath.
  ext4: ['mkfs.ext4', '-q', '-F', '-E', 'nodiscard'],
  xfs: ['mkfs.xfs', '-q', '-f', '-K'],
};
/** The storage that lies in memory. */
export const MEMORY = '/dev/shm';
/** No thread of ext4's that goes on making the file system while it is measured. */
const mountOptions = { ext4: ['-o', 'noinit_itable'], xfs: [] };

/**
 * A file system on a loop device of its own. Its backing file is allocated first, and the loop
 * device bypasses the host's page cache, so that what is timed is the disk and not the growth of
 * a file in memory.
 * @param {'ext4' | 'xfs'} type
 * @param {number} size bytes
 * @param {(folder: string) => Promise<void>} body
 * @param {{ home?: string, sparse?: boolean }} [how] home: the folder that its backing file lies in;
 *   sparse: for files that are reserved and hardly written to
 */
export async function withFilesystem(type, size, body, how = {}) {
  const filesystem = createFilesystem(type, size, how);
  const leave = () => filesystem.dispose();
  const interrupted = () => process.exit(130);
  process.once('exit', leave);
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.once(signal, interrupted);
  try {
    await body(filesystem.path);
  } finally {
    leave();
    process.off('exit', leave);
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.off(signal, interrupted);
  }
}

function createFilesystem(type, size, { home = process.env.THICKEN_SCRATCH ?? '/var/tmp', sparse = false }) {
  const { bavail, bsize } = statfsSync(home);
  if (!sparse && bavail * bsize < size) throw new Error(`${home} has less than ${size} bytes free`);
  const folder = mkdtempSync(join(home, 'thicken-bench-'));
  const [image, path] = [join(folder, 'image'), join(folder, 'mount')];
  const undo = [() => rmSync(folder, { recursive: true })];
  const dispose = () => {
    while (undo.length > 0) undo.pop()();
  };
  try {
    makeBacking(image, size, sparse);
    if (home === MEMORY) touch(image, size);
    const device = attach(image);
    undo.push(() => detach(device, image));
    execFileSync(mkfs[type][0], [...mkfs[type].slice(1), device]);
    mkdirSync(path);
    execFileSync('mount', ['-t', type, ...mountOptions[type], device, path]);
    undo.push(() => execFileSync('umount', ['--lazy', path]));
  } catch (error) {
    dispose();
    throw error;
  }
  return { path, dispose };
}

function makeBacking(image, size, sparse) {
  const [command, option] = sparse ? ['truncate', '-s'] : ['fallocate', '-l'];
  execFileSync(command, [option, String(size), image]);
}

/**
 * A virtual machine's memory may have to be fetched from its host at the first touch: that made a copy
 * of 4 GiB take 9 s in place of 1.2 for whoever came to new blocks first.
 */
function touch(image, size) {
  const whole = ['if=/dev/zero', `of=${image}`, 'bs=4M', `count=${size}`, 'iflag=count_bytes', 'conv=notrunc'];
  execFileSync('dd', [...whole, 'status=none']);
}

function attach(image) {
  const args = ['--find', '--show', '--direct-io=on', image];
  return execFileSync('losetup', args, { encoding: 'utf8' }).trim();
}

function detach(device, image) {
  const backing = readFileSync(`/sys/block/${basename(device)}/loop/backing_file`, 'utf8');
  if (backing === `${image}\n`) execFileSync('losetup', ['--detach', device]);
}
