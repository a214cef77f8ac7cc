/** What the user named. */
import type { Stats } from 'node:fs';
import { stat } from 'node:fs/promises';
import { Descriptor, READ_ONLY } from './descriptor.js';
import { errors, isRawSystemError, systemError } from './errors.js';

export interface Target {
  kind: 'file' | 'block';
  descriptor: Descriptor;
  /** What the user named, where that was no path: a guest's disk. */
  name?: string;
}

/** A disk that a running QEMU has open. */
export interface GuestTarget {
  /** The address of its monitor: a path, unix:PATH, or tcp:HOST:PORT. */
  qmp: string;
  /** The id of its -device, its -drive, its node, or its QOM path. */
  device: string;
}

/** What a guest's disk is called in results. */
export function nameOf({ qmp, device }: GuestTarget): string {
  return `${qmp}#${device}`;
}

/** Opens a file or block device for reading. Throws the errno's name, EISDIR, or UNSUPPORTED, CHANGED. */
export async function openTarget(name: string): Promise<Target> {
  const facts = await lookAt(name);
  const kind = kindOf(facts, name);
  return { kind, descriptor: await Descriptor.openSame(name, READ_ONLY, facts) };
}

/** Looked at before it is opened: to open a tape or a terminal has effects of its own. */
async function lookAt(path: string): Promise<Stats> {
  return stat(path).catch((error: unknown) => {
    throw isRawSystemError(error) ? systemError(error, path) : error;
  });
}

function kindOf(facts: Stats, path: string): 'file' | 'block' {
  if (facts.isFile()) return 'file';
  if (facts.isBlockDevice()) return 'block';
  if (facts.isDirectory()) throw errors.notAnImage(path, 'directory');
  if (facts.isFIFO()) throw errors.notAnImage(path, 'FIFO');
  if (facts.isSocket()) throw errors.notAnImage(path, 'socket');
  throw errors.notAnImage(path, 'character device');
}
