/** Who else has a file or a device open. */
import { readdir, readFile, readlink, stat } from 'node:fs/promises';
import type { Stats } from 'node:fs';

export interface Users {
  /** Processes and kernel drivers that have it open, for people. */
  by: string[];
  /** Whether some processes' descriptors could not be seen. */
  blind: boolean;
}

type Numbers = ReadonlySet<number>;
const NONE: Numbers = new Set();

/** Which open files count. */
type Matches = (facts: Stats) => boolean;

/** Who has this file open (same device and inode), this process left out. */
export async function usersOfFile(path: string): Promise<Users> {
  const own = await stat(path);
  const matches: Matches = (facts) => facts.dev === own.dev && facts.ino === own.ino;
  return collect(matches, async () => loopsOver((facts) => matches(facts)));
}

/**
 * Who has this block device open, one of its partitions, or the disk that it is a partition of;
 * `ownDescriptors` are this process's, and don't count.
 */
export async function usersOfDevice(
  path: string,
  ownDescriptors: Numbers,
): Promise<Users> {
  const own = await stat(path);
  const numbers = new Set(await relatedDevices(own.rdev));
  const matches: Matches = (facts) => facts.isBlockDevice() && numbers.has(facts.rdev);
  return collect(matches, async () => loopsOver(matches), ownDescriptors);
}

async function collect(
  matches: Matches,
  kernel: () => Promise<string[]>,
  ownDescriptors?: Numbers,
): Promise<Users> {
  const users: Users = { by: await kernel(), blind: false };
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name))) {
    const ignored = Number(pid) === process.pid ? ownDescriptors : NONE;
    // Without a list, nothing of this process counts.
    if (ignored === undefined) continue;
    const found = await usesIt(pid, matches, ignored);
    if (found === null) users.blind = true;
    else if (found) users.by.push(`${await nameOf(pid)} (pid ${pid})`);
  }
  return users;
}

/** null where the process may not be looked into. */
async function usesIt(pid: string, matches: Matches, ignored: Numbers): Promise<boolean | null> {
  let names: string[];
  try {
    names = await readdir(`/proc/${pid}/fd`);
  } catch (error) {
    return isDenied(error) ? null : false;
  }
  const open = await Promise.all(
    names
      .filter((name) => !ignored.has(Number(name)))
      .map(async (name) => {
        const facts = await stat(`/proc/${pid}/fd/${name}`).catch(() => null);
        return facts !== null && matches(facts);
      }),
  );
  return open.includes(true);
}

function isDenied(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException;
  return code === 'EACCES' || code === 'EPERM';
}

async function nameOf(pid: string): Promise<string> {
  const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => 'a process');
  return name.trim();
}

/** Loop devices hold their file open inside the kernel, where /proc/PID/fd does not show it. */
async function loopsOver(matches: Matches): Promise<string[]> {
  const names = (await readdir('/sys/block').catch(() => [])).filter((n) => n.startsWith('loop'));
  const found = await Promise.all(
    names.map(async (name) => {
      const backing = await readFile(`/sys/block/${name}/loop/backing_file`, 'utf8').catch(
        () => null,
      );
      if (backing === null) return null;
      const facts = await stat(backing.trimEnd()).catch(() => null);
      return facts !== null && matches(facts) ? `/dev/${name}` : null;
    }),
  );
  return found.filter((name) => name !== null);
}

/** The device's number, those of its partitions, and that of the disk that it is a part of. */
async function relatedDevices(rdev: number): Promise<number[]> {
  const folder = `/sys/dev/block/${deviceName(rdev)}`;
  const numbers = [rdev];
  const children = await readdir(folder).catch(() => []);
  const parent = (await isPartition(folder)) ? [`${await realFolder(folder)}/..`] : [];
  for (const place of [...children.map((child) => `${folder}/${child}`), ...parent]) {
    const child = place.startsWith(`${folder}/`);
    if (child && !(await isPartition(place))) continue;
    const text = await readFile(`${place}/dev`, 'utf8').catch(() => null);
    const match = text === null ? null : /^(\d+):(\d+)/.exec(text);
    if (match) numbers.push(makeDevice(Number(match[1]), Number(match[2])));
  }
  return numbers;
}

async function realFolder(folder: string): Promise<string> {
  return `/sys/dev/block/${await readlink(folder)}`;
}

async function isPartition(folder: string): Promise<boolean> {
  return (await readFile(`${folder}/partition`, 'utf8').catch(() => null)) !== null;
}

/** makedev(3) as the GNU C library packs it into st_rdev. */
export function makeDevice(major: number, minor: number): number {
  const bits =
    (BigInt(minor) & 0xffn) |
    ((BigInt(major) & 0xfffn) << 8n) |
    ((BigInt(minor) & ~0xffn) << 12n) |
    ((BigInt(major) & ~0xfffn) << 32n);
  return Number(bits);
}

/** `major:minor` of a device number, as sysfs names devices. */
export function deviceName(device: number): string {
  const bits = BigInt(device);
  const major = ((bits >> 8n) & 0xfffn) | ((bits >> 32n) & ~0xfffn);
  const minor = (bits & 0xffn) | ((bits >> 12n) & ~0xffn & 0xffffffffn);
  return `${major}:${minor}`;
}
