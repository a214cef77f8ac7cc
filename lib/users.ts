/** Who else has a file or a device open. */
import type { Stats } from 'node:fs';
import { readdir, readFile, readlink, stat } from 'node:fs/promises';
import { Descriptor, READ_ONLY } from './descriptor.js';
import { native } from './native.js';

export interface Users {
  /** Processes and loop devices that have it open, for people. */
  by: string[];
  /** Whether some processes, or their descriptors, could not be seen. */
  blind: boolean;
}

type Numbers = ReadonlySet<number>;
const NONE: Numbers = new Set();

interface Search {
  /** Whether an open file is the one looked for. */
  matches(facts: Stats): boolean;
  /** Whether a loop device's backing, by its device and inode or its device number, is. */
  backs(loop: { device: number; inode: number; blockDevice: number }): boolean;
  writersOnly: boolean;
  /** Descriptors of this process that don't count; undefined: none of them does. */
  own?: Numbers;
  exceptLoop?: string | undefined;
}

/** The initial namespace of process ids has this inode (linux/proc_ns.h, PROC_PID_INIT_INO). */
const INITIAL_PID_NAMESPACE = 0xeffffffc;

export interface SearchOptions {
  /** Whether those who only read are left out. */
  writersOnly?: boolean;
  /** A loop device that doesn't count, as sysfs names it. */
  exceptLoop?: string | undefined;
}

/** Who has a file open, this process left out. */
export function usersOfFile(
  { dev, ino }: Pick<Stats, 'dev' | 'ino'>,
  { writersOnly = false, exceptLoop }: SearchOptions = {},
): Promise<Users> {
  return collect({
    matches: (other) => other.dev === dev && other.ino === ino,
    backs: (loop) => loop.device === dev && loop.inode === ino,
    writersOnly,
    exceptLoop,
  });
}

/**
 * Who has a block device open, one of its partitions, or the disk that it is a partition of; `own`
 * are descriptors of this process that don't count.
 */
export async function usersOfDevice(
  rdev: number,
  own: Numbers,
  { writersOnly = false, exceptLoop }: SearchOptions = {},
): Promise<Users> {
  const numbers = new Set(await relatedDevices(rdev));
  return collect({
    matches: (other) => other.isBlockDevice() && numbers.has(other.rdev),
    backs: (loop) => numbers.has(loop.blockDevice),
    writersOnly,
    own,
    exceptLoop,
  });
}

async function collect(search: Search): Promise<Users> {
  const namespace = await stat('/proc/self/ns/pid').catch(() => null);
  const users: Users = {
    by: await loopsOver(search),
    blind: namespace?.ino !== INITIAL_PID_NAMESPACE,
  };
  for (const pid of (await readdir('/proc')).filter((name) => /^\d+$/.test(name))) {
    const ignored = Number(pid) === process.pid ? search.own : NONE;
    if (ignored === undefined) continue;
    const found = await usesIt(pid, search, ignored);
    if (found === null) users.blind = true;
    else if (found) users.by.push(`${await nameOf(pid)} (pid ${pid})`);
  }
  return users;
}

/** null where the process may not be looked into. */
async function usesIt(pid: string, search: Search, ignored: Numbers): Promise<boolean | null> {
  try {
    const names = await readdir(`/proc/${pid}/fd`);
    if (await hasOpen(`/proc/${pid}`, names, search, ignored)) return true;
    // A process whose first thread has ended shows its descriptors only under the others.
    if (names.length === 0 && (await threadsHaveOpen(pid, search, ignored))) return true;
  } catch (error) {
    return isDenied(error) ? null : false;
  }
  return hasMapped(pid, search);
}

async function hasOpen(
  folder: string,
  names: string[],
  search: Search,
  ignored: Numbers,
): Promise<boolean> {
  const open = await Promise.all(
    names
      .filter((name) => !ignored.has(Number(name)))
      .map(async (name) => {
        const facts = await stat(`${folder}/fd/${name}`).catch(() => null);
        if (facts === null || !search.matches(facts)) return false;
        return !search.writersOnly || isWritable(`${folder}/fdinfo/${name}`);
      }),
  );
  return open.includes(true);
}

async function threadsHaveOpen(pid: string, search: Search, ignored: Numbers): Promise<boolean> {
  for (const thread of await readdir(`/proc/${pid}/task`)) {
    const folder = `/proc/${pid}/task/${thread}`;
    const names = await readdir(`${folder}/fd`).catch(() => []);
    if (await hasOpen(folder, names, search, ignored)) return true;
  }
  return false;
}

/** Access mode of a descriptor (proc(5), fdinfo: flags in octal); a cautious yes if it is gone. */
async function isWritable(fdinfo: string): Promise<boolean> {
  const text = await readFile(fdinfo, 'utf8').catch(() => '');
  const flags = /^flags:\s*([0-7]+)/m.exec(text);
  return flags === null || (parseInt(flags[1]!, 8) & 3) !== 0;
}

/** A shared, writable mapping outlives the descriptor that it was made from. */
async function hasMapped(pid: string, search: Search): Promise<boolean> {
  const maps = await readFile(`/proc/${pid}/maps`, 'utf8').catch(() => '');
  for (const line of maps.split('\n')) {
    const shared = /^(\S+) .w.s \S+ \S+ [1-9]/.exec(line);
    if (!shared) continue;
    const facts = await stat(`/proc/${pid}/map_files/${shared[1]}`).catch(() => null);
    if (facts !== null && search.matches(facts)) return true;
  }
  return false;
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
async function loopsOver(search: Search): Promise<string[]> {
  const names = (await readdir('/sys/block').catch(() => [])).filter((n) => n.startsWith('loop'));
  const found = await Promise.all(
    names
      .filter((name) => name !== search.exceptLoop)
      .map(async (name) => ((await loopIsOver(name, search)) ? `/dev/${name}` : null)),
  );
  return found.filter((name) => name !== null);
}

async function loopIsOver(name: string, search: Search): Promise<boolean> {
  const text = await readFile(`/sys/block/${name}/loop/backing_file`, 'utf8').catch(() => null);
  if (text === null) return false;
  const facts = await stat(text.replace(/\n$/, '')).catch(() => null);
  if (facts) return search.matches(facts);
  // Deleted, or out of sight: the device itself knows. Not asked first, since whoever watches it
  // would have to look into every open.
  await using device = await Descriptor.open(`/dev/${name}`, READ_ONLY).catch(() => null);
  const loop = device && (await device.use((fd) => native().loopFacts(fd)));
  return loop !== null && search.backs(loop);
}

/** The device's number, those of its partitions, and that of the disk that it is a part of. */
async function relatedDevices(rdev: number): Promise<number[]> {
  const folder = `/sys/dev/block/${deviceName(rdev)}`;
  const children = await readdir(folder).catch(() => []);
  const places = children.map((child) => `${folder}/${child}`);
  const partitions = await Promise.all(
    places.map(async (place) => ((await isPartition(place)) ? numberOf(place) : null)),
  );
  const disk = (await isPartition(folder)) ? await numberOf(`${await realFolder(folder)}/..`) : null;
  return [rdev, disk, ...partitions].filter((number) => number !== null);
}

/** The number of the device that a folder of sysfs is about. */
async function numberOf(folder: string): Promise<number | null> {
  const text = await readFile(`${folder}/dev`, 'utf8').catch(() => '');
  const match = /^(\d+):(\d+)/.exec(text);
  return match ? makeDevice(Number(match[1]), Number(match[2])) : null;
}

/** Where sysfs tells of a device; of the whole disk where it is a partition. */
export async function diskFolder(rdev: number): Promise<string> {
  const folder = `/sys/dev/block/${deviceName(rdev)}`;
  return (await isPartition(folder)) ? `${await realFolder(folder)}/..` : folder;
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
