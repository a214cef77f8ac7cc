/** Proof that nobody else writes to an image, held for as long as this process does. */
import { readFile, stat } from 'node:fs/promises';
import { Descriptor, DIRECT, EXCLUSIVE, READ_ONLY, READ_WRITE } from './descriptor.js';
import { errors, isRawSystemError, ThickenError } from './errors.js';
import { native } from './native.js';
import { deviceName, usersOfDevice, usersOfFile } from './users.js';

/**
 * QEMU's permissions, by their bit: byte 100+n is locked for a permission held, byte 200+n for one
 * that is not shared (block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE).
 */
const PERMISSIONS = { consistentRead: 0, write: 1, writeUnchanged: 2, resize: 3 } as const;
const HELD = 100;
const UNSHARED = 200;
const ALL = Object.values(PERMISSIONS);

export const QEMU_LOCK_BYTES = [...ALL.map((n) => HELD + n), ...ALL.map((n) => UNSHARED + n)];

const { consistentRead, write, resize } = PERMISSIONS;
const OURS = [HELD + consistentRead, HELD + write, UNSHARED + write, UNSHARED + resize];
const CONFLICTS = [UNSHARED + consistentRead, UNSHARED + write, HELD + write, HELD + resize];

const USE_QMP =
  'stop what uses it; a guest that runs is allocated through its monitor: --qmp SOCKET --device ID';
const USE_QMP_OR_FALLOC = `use --preallocation falloc where the file system has fallocate, which is safe beside writers; or ${USE_QMP}`;

/**
 * Takes QEMU's locks on a file, so that no other user of the image may write or resize it, and
 * refuses (IN_USE) where one does. In this order: no foreign writer, the locks, and once more no
 * foreign writer, since a loop device heeds no lock. The lease probe does not see past a writing
 * descriptor of our own, so the caller opens its own only afterwards.
 */
export async function holdFile(file: Descriptor, trusted: boolean): Promise<Descriptor> {
  await file.checkWritable();
  const lock = await file.reopen(READ_ONLY);
  try {
    await refuseWriters(lock, trusted);
    await takeLocks(lock);
    await refuseWriters(lock, trusted);
    return lock;
  } catch (error) {
    await lock.close();
    throw error;
  }
}

async function takeLocks(lock: Descriptor): Promise<void> {
  await lock.use((fd) => native().takeLocks(fd, OURS));
  const held = await lock.use((fd) => native().probeLocks(fd, CONFLICTS));
  if (held.length > 0) throw await inUse(lock.path, held);
}

async function refuseWriters(lock: Descriptor, trusted: boolean): Promise<void> {
  let writer: boolean;
  try {
    writer = await lock.use(async (fd) => {
      try {
        return await native().probeWriter(fd);
      } catch (error) {
        if (trusted && isRawSystemError(error)) return false;
        throw error;
      }
    });
  } catch (error) {
    if (!(error instanceof ThickenError) || error.errno === undefined) throw error;
    throw errors.cannotTellUsers(lock.path, `${error.syscall} answers ${error.code}`);
  }
  if (writer) throw await inUse(lock.path, []);
}

async function inUse(path: string, locks: number[]): Promise<ThickenError> {
  const use = await findUse(path, locks);
  return errors.inUse(path, use.by, USE_QMP_OR_FALLOC);
}

/** How an image is used by others: for `info`, and for refusals. */
export interface ImageUse {
  by: string;
  /** Bytes of QEMU's lock protocol that somebody holds. */
  locks: number[];
}

async function findUse(path: string, locks: number[]): Promise<ImageUse> {
  const users = await usersOfFile(path);
  const by = users.by.length > 0 ? users.by.join(', ') : 'a process that can’t be seen from here';
  return { by, locks };
}

/** null where nobody writes to the file, and nobody holds QEMU's locks on it. */
export async function fileUse(file: Descriptor): Promise<ImageUse | null> {
  const locks = await file.use((fd) => native().probeLocks(fd, QEMU_LOCK_BYTES));
  // Whoever may not probe is told what the locks say.
  const writer = await file.use((fd) => native().probeWriter(fd).catch(() => false));
  return locks.length > 0 || writer ? findUse(file.path, locks) : null;
}

/**
 * Opens a block device for itself: O_EXCL against mounts, swap and device-mapper, QEMU's locks on
 * the node, and no foreign descriptor on the same device, its partitions or its disk (neither
 * O_EXCL nor locks keep QEMU off, or show through another node).
 */
export async function holdDevice(image: Descriptor, trusted: boolean): Promise<Descriptor> {
  const device = await openExclusive(image);
  try {
    await device.use((fd) => native().takeLocks(fd, OURS));
    const held = await device.use((fd) => native().probeLocks(fd, CONFLICTS));
    if (held.length > 0) throw errors.inUse(image.path, await whoOpened(device), USE_QMP);
    await refuseUsers(device, trusted);
    return device;
  } catch (error) {
    await device.close();
    throw error;
  }
}

async function openExclusive(image: Descriptor): Promise<Descriptor> {
  try {
    return await image.reopen(READ_WRITE | EXCLUSIVE | DIRECT);
  } catch (error) {
    if (!(error instanceof ThickenError) || error.code !== 'EBUSY') throw error;
    throw errors.inUse(image.path, 'a mounted file system, swap, or another driver', USE_QMP);
  }
}

async function refuseUsers(device: Descriptor, trusted: boolean): Promise<void> {
  const users = await deviceUsers(device);
  if (users.by.length > 0) throw errors.inUse(device.path, users.by.join(', '), USE_QMP);
  if (users.blind && !trusted) {
    throw errors.cannotTellUsers(device.path, 'descriptors of other users’ processes are hidden');
  }
}

async function whoOpened(device: Descriptor): Promise<string> {
  const users = await deviceUsers(device);
  return users.by.join(', ') || 'a process that can’t be seen from here';
}

function deviceUsers(device: Descriptor) {
  return usersOfDevice(device.path, Descriptor.ownNumbers());
}

/** null where nobody else has the device open. */
export async function deviceUse(device: Descriptor): Promise<ImageUse | null> {
  const locks = await device.use((fd) => native().probeLocks(fd, QEMU_LOCK_BYTES));
  const users = await deviceUsers(device);
  const mounted = await isMounted(device.path);
  const by = [...users.by, ...(mounted ? ['a mounted file system'] : [])];
  return by.length > 0 || locks.length > 0 ? { by: by.join(', '), locks } : null;
}

async function isMounted(path: string): Promise<boolean> {
  const { rdev } = await stat(path);
  const mounts = await readFile('/proc/self/mountinfo', 'utf8');
  return mounts.split('\n').some((line) => line.split(' ')[2] === deviceName(rdev));
}
