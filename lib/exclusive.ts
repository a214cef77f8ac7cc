/** QEMU's image locks, and who uses an image: what both kinds of hold are made of. */
import { fstat } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { promisify } from 'node:util';
import { Descriptor, READ_ONLY } from './descriptor.js';
import { errors, type ThickenError } from './errors.js';
import { native, type Work } from './native.js';
import { partialOf, plus, withPartial } from './outcomes.js';
import { deviceName, usersOfDevice, usersOfFile, type Users } from './users.js';

const statOf = promisify(fstat);

/**
 * QEMU's permissions, by their bit: byte 100+n is locked for a permission held, byte 200+n for one
 * that is not shared (block/file-posix.c, RAW_LOCK_PERM_BASE and RAW_LOCK_SHARED_BASE).
 */
const PERMISSIONS = { consistentRead: 0, write: 1, writeUnchanged: 2, resize: 3 } as const;
const HELD = 100;
const UNSHARED = 200;
const ALL = Object.values(PERMISSIONS);
const QEMU_LOCK_BYTES = [...ALL.map((n) => HELD + n), ...ALL.map((n) => UNSHARED + n)];

const { consistentRead, write, resize } = PERMISSIONS;
const OURS = [HELD + consistentRead, HELD + write, UNSHARED + write, UNSHARED + resize];
const CONFLICTS = [UNSHARED + consistentRead, UNSHARED + write, HELD + write, HELD + resize];

/** For reading what must not change meanwhile. */
const READERS = [HELD + consistentRead, UNSHARED + write, UNSHARED + resize];
const READERS_CONFLICTS = [UNSHARED + consistentRead, HELD + write, HELD + resize];

const USE_QMP =
  'stop what uses it; a guest that runs is allocated through its monitor: --qmp SOCKET --device ID';
const USE_FALLOC =
  'use --preallocation falloc where the file system has fallocate, which is safe beside writers; or ';

const UNSEEN = 'a process that can’t be seen from here';

export function factsOf(file: Descriptor) {
  return file.use((fd) => statOf(fd));
}

/** Takes our locks, then probes (safety rule 4); returns the bytes that others hold against us. */
export async function takeImageLocks(file: Descriptor): Promise<number[]> {
  await file.use((fd) => native().takeLocks(fd, OURS));
  return probeConflicts(file);
}

/**
 * Keeps QEMUs from opening a file for writing until what is returned is closed. Throws IN_USE where one
 * has it open so already.
 */
export async function keepUnchanged(file: Descriptor): Promise<Descriptor> {
  const lock = await file.reopen(READ_ONLY);
  try {
    await lock.use((fd) => native().takeLocks(fd, READERS));
    const held = await lock.use((fd) => native().probeLocks(fd, READERS_CONFLICTS));
    if (held.length > 0) throw await fileInUse(file, true);
    return lock;
  } catch (error) {
    await lock.close();
    throw error;
  }
}

export function probeConflicts(file: Descriptor): Promise<number[]> {
  return file.use((fd) => native().probeLocks(fd, CONFLICTS));
}

/** `guarded`: what is to be changed is never safe beside a writer, unlike raw files at `falloc`. */
export async function fileInUse(file: Descriptor, guarded = false): Promise<ThickenError> {
  const { by } = await usersOfFile(await factsOf(file));
  return errors.inUse(file.path, by.join(', ') || UNSEEN, guarded ? USE_QMP : USE_FALLOC + USE_QMP);
}

export function deviceInUse(path: string, by: string[]): ThickenError {
  return errors.inUse(path, by.join(', ') || UNSEEN, USE_QMP);
}

/** How an image is used by others, for `info`. */
export interface ImageUse {
  use: { by: string; locks: number[] } | null;
  /** That there may be users that can't be seen from here. */
  warnings: string[];
}

const UNSURE = ['whether something else uses the image can’t be told from here'];

function usedBy(by: string[], locks: number[]): ImageUse {
  return { use: { by: by.join(', ') || UNSEEN, locks }, warnings: [] };
}

function unused(unsure: boolean): ImageUse {
  return { use: null, warnings: unsure ? UNSURE : [] };
}

/** Who writes to a file, or holds QEMU's locks on it. */
export async function fileUse(file: Descriptor): Promise<ImageUse> {
  const locks = await file.use((fd) => native().probeLocks(fd, QEMU_LOCK_BYTES));
  const writer = await file.use((fd) => native().probeWriter(fd)).catch(() => null);
  if (locks.length === 0 && !writer) return unused(writer === null);
  const { by } = await usersOfFile(await factsOf(file));
  return usedBy(by, locks);
}

/** Who has a device open, or holds QEMU's locks on its node. */
export async function deviceUse(device: Descriptor): Promise<ImageUse> {
  const locks = await device.use((fd) => native().probeLocks(fd, QEMU_LOCK_BYTES));
  const { rdev } = await factsOf(device);
  const users = await usersOfDevice(rdev, Descriptor.ownNumbers());
  const by = [...users.by, ...((await isMounted(rdev)) ? ['a mounted file system'] : [])];
  if (by.length === 0 && locks.length === 0) return unused(users.blind);
  return usedBy(by, locks);
}

async function isMounted(rdev: number): Promise<boolean> {
  const mounts = await readFile('/proc/self/mountinfo', 'utf8');
  return mounts.split('\n').some((line) => line.split(' ')[2] === deviceName(rdev));
}

/** Throws IN_USE for users, and where there may be unseen ones unless the caller vouches for it. */
export function refuseUsers(path: string, users: Users, trusted: boolean): void {
  if (users.by.length > 0) throw deviceInUse(path, users.by);
  if (users.blind && !trusted) {
    throw errors.cannotTellUsers(path, 'other users’ or other namespaces’ processes are hidden');
  }
}

/** A monitor that looks at the image every few milliseconds must not keep a run going for ever. */
const MOST_VAIN_ROUNDS = 100;

/**
 * Does all of `ranges`, though an open of the image may stop the work on the way: then `prove` must
 * show again that nobody else writes, and the rest follows. Throws IN_USE where opens come so fast
 * that nothing gets done; what the rounds before a failure did is its cause's `partial`.
 */
export async function workUndisturbed(
  path: string,
  ranges: Float64Array,
  work: (ranges: Float64Array) => Promise<Work>,
  prove: () => Promise<void>,
): Promise<Work> {
  let total = await work(ranges);
  let rest = ranges;
  let vain = 0;
  try {
    for (let last = total; last.disturbed && !last.cancelled;) {
      const done = last.allocated + last.skipped;
      vain = done > 0 ? 0 : vain + 1;
      if (vain > MOST_VAIN_ROUNDS) throw errors.openedOverAndOver(path);
      await prove();
      rest = withoutFirst(rest, done);
      last = await work(rest);
      total = plus(total, last);
    }
  } catch (error) {
    throw withPartial(error, plus(total, partialOf(error)));
  }
  return total;
}

/** `ranges` without their first `bytes`: work goes through them in order. */
export function withoutFirst(ranges: Float64Array, bytes: number): Float64Array {
  const rest: number[] = [];
  let left = bytes;
  for (let i = 0; i < ranges.length; i += 2) {
    const done = Math.min(left, ranges[i + 1]!);
    left -= done;
    if (done < ranges[i + 1]!) rest.push(ranges[i]! + done, ranges[i + 1]! - done);
  }
  return Float64Array.from(rest);
}
