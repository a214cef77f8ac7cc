/** What thicken adds to a QEMU carries the name of the process that added it. */
import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { basename } from 'node:path';
import process from 'node:process';

const PREFIX = 'thicken';

/** When a process began, in ticks since the start of the machine (proc(5), stat, field 22). */
function startOf(pid: number): string | null {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1');
    // The name of the program, in parentheses, may hold anything.
    return text.slice(text.lastIndexOf(')') + 2).split(' ')[19] ?? null;
  } catch {
    return null;
  }
}

/** `thicken-PID-START-RANDOM`: a node, an export, a folder. */
export function ownName(): string {
  return `${PREFIX}-${process.pid}-${startOf(process.pid) ?? 0}-${randomBytes(4).toString('hex')}`;
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

/** Whether something was left behind by a thicken that is no more. */
export function isAbandoned(name: string): boolean {
  if (givenUp.has(name)) return true;
  const [, pid, start] = /^thicken-(\d+)-(\d+)-[0-9a-f]+/.exec(name) ?? [];
  if (pid === undefined) return false;
  return startOf(Number(pid)) !== start;
}
