/** What thicken adds to a QEMU carries the name of the process that added it. */
import { randomBytes } from 'node:crypto';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { getPriority } from 'node:os';
import { basename } from 'node:path';
import process from 'node:process';

const PREFIX = 'thicken';

/** The namespace of process ids that all others are parts of (linux/proc_ns.h, PROC_PID_INIT_INO). */
const FIRST_NAMESPACE = 'effffffc';
const NO_NAMESPACE = '00000000';

/**
 * When a process began, in ticks since the start of the machine (proc(5), stat, field 22); null of one that has
 * ended, also where nobody has reaped it yet.
 */
function startOf(pid: string): string | null {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1');
    // The name of the program, in parentheses, may hold anything.
    const fields = text.slice(text.lastIndexOf(')') + 2).split(' ');
    // The first thread may have ended before the others.
    const over = fields[0] === 'Z' && Number(fields[17]) <= 1;
    return over ? null : (fields[19] ?? null);
  } catch {
    return null;
  }
}

/** Whether a process is there that is not shown to us (proc(5), hidepid): its priority anybody may ask for. */
function isHidden(pid: string): boolean {
  if (readOr('', `/proc/${pid}/stat`) !== '') return false;
  try {
    getPriority(Number(pid));
    return true;
  } catch {
    return false;
  }
}

/** What process ids count in: as hexadecimal digits, those of sockets' paths being few. */
interface Place {
  /** Of the machine's boot id, which is another on each machine, and after each start. */
  boot: string;
  /** The inode of the namespace (pid_namespaces(7)). */
  namespace: string;
}

function ownPlace(): Place {
  return { boot: readOr('000000', '/proc/sys/kernel/random/boot_id').slice(0, 6), namespace: namespaceOf('self') ?? NO_NAMESPACE };
}

function readOr(instead: string, path: string): string {
  try {
    return readFileSync(path, 'latin1');
  } catch {
    return instead;
  }
}

/** null where the process is no more. */
function namespaceOf(pid: string): string | null {
  try {
    const [, inode] = /\[(\d+)\]/.exec(readlinkSync(`/proc/${pid}/ns/pid`)) ?? [];
    return Number(inode).toString(16).padStart(8, '0');
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'ENOENT' ? null : NO_NAMESPACE;
  }
}

/** Whether /proc shows the processes by the ids that they have for us. */
function seesOwn(): boolean {
  try {
    return readlinkSync('/proc/self') === String(process.pid);
  } catch {
    return false;
  }
}

/** `thicken-PID-START-PLACE-RANDOM`: a node, an export, a folder. */
export function ownName(): string {
  const { boot, namespace } = ownPlace();
  const owner = `${PREFIX}-${process.pid}-${startOf('self') ?? 0}-${boot}${namespace}`;
  return `${owner}-${randomBytes(4).toString('hex')}`;
}

/** Of what outlives this process on purpose. */
export function detachedName(): string {
  return `${PREFIX}-detached-${randomBytes(6).toString('hex')}`;
}

const DAEMON = '-daemon';

/** The name of the folder in which a storage daemon of ours has its sockets. */
export function daemonFolderName(): string {
  return ownName() + DAEMON;
}

export function isDaemonFolder(name: string): boolean {
  return name.startsWith(PREFIX) && name.includes(DAEMON);
}

const givenUp = new Set<string>();

/** What this process could not take away again: a later run in it may. A name, or a path that ends in it. */
export function giveUp(name: string): void {
  givenUp.add(basename(name));
}

/**
 * Whether something was left behind by a thicken that is no more. One of another machine (a QEMU may be spoken
 * to by TCP) or in a namespace that can't be seen from here may live: what is its own is let be.
 */
export function isAbandoned(name: string): boolean {
  if (givenUp.has(name)) return true;
  const [, pid, start, boot, namespace] = /^thicken-(\d+)-(\d+)-([0-9a-f]{6})([0-9a-f]{8})-[0-9a-f]+/.exec(name) ?? [];
  if (pid === undefined) return false;
  const own = ownPlace();
  if (boot !== own.boot || !seesOwn()) return false;
  if (namespace === own.namespace) return startOf(pid) !== start && !isHidden(pid);
  return own.namespace === FIRST_NAMESPACE && isEmpty(namespace!);
}

/** Whether no process is in a namespace, or could be: seen from the first one, where all processes show. */
function isEmpty(namespace: string): boolean {
  // Who is not shown the first process may be shown a part of them only (proc(5), hidepid).
  if (startOf('1') === null) return false;
  const pids = readdirSync('/proc').filter((name) => /^\d+$/.test(name) && isNested(name) && startOf(name) !== null);
  return pids.map(namespaceOf).every((of) => of !== namespace && of !== NO_NAMESPACE);
}

/** Whether a process has an id in a namespace below, too: everybody may know that (proc(5), status, NSpid). */
function isNested(pid: string): boolean {
  return /^NSpid:\t\d+\t/m.test(readOr('', `/proc/${pid}/status`));
}
