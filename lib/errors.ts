/**
 * Every error that leaves thicken, and every message: what happened, on which file and range; what
 * to do about it.
 */
import { constants } from 'node:os';
import type { AllocationDone } from './types.js';

export interface ErrorDetails {
  /** The kernel's error number, as errno(3) has it (positive). */
  errno?: number | undefined;
  syscall?: string | undefined;
  path?: string | undefined;
  /** Bytes. */
  offset?: number | undefined;
  length?: number | undefined;
  /** Bytes; with ENOSPC and EDQUOT. */
  needed?: number | undefined;
  available?: number | undefined;
  /** What had been done, where a run ended early. */
  done?: AllocationDone | undefined;
  /** The QMP command that failed, and QEMU's class and words for it. */
  command?: string | undefined;
  qmpClass?: string | undefined;
  desc?: string | undefined;
  cause?: unknown;
}

const BRAND = Symbol.for('thicken.error');

/**
 * An error with a stable `code`. Those with code RANGE are `RangeError`s and yet answer to
 * `instanceof ThickenError`.
 */
export class ThickenError extends Error {
  declare readonly code: string;
  declare readonly errno?: number;
  declare readonly syscall?: string;
  declare readonly path?: string;
  declare readonly offset?: number;
  declare readonly length?: number;
  declare readonly needed?: number;
  declare readonly available?: number;
  declare readonly done?: AllocationDone;
  declare readonly command?: string;
  declare readonly qmpClass?: string;
  declare readonly desc?: string;

  constructor(code: string, message: string, details: ErrorDetails = {}) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.name = 'ThickenError';
    brand(this, code, details);
  }

  static override [Symbol.hasInstance](value: unknown): boolean {
    return typeof value === 'object' && value !== null && BRAND in value;
  }
}

function brand(error: Error, code: string, details: ErrorDetails): void {
  Object.defineProperty(error, BRAND, { value: true });
  Object.assign(error, { code });
  addDetails(error, details);
}

function addDetails(error: Error, details: ErrorDetails): void {
  for (const [key, value] of Object.entries(details) as [string, unknown][]) {
    if (key !== 'cause' && value !== undefined) Object.assign(error, { [key]: value });
  }
}

/** The error as the contract's JSON object. */
export function errorJson(error: ThickenError): Record<string, unknown> {
  const { code, message, errno, syscall, path, offset, length, needed, available } = error;
  return { code, message, errno, syscall, path, offset, length, needed, available };
}

/** `error` again with `details` added; used to say how far a run had come. */
export function withDetails(error: ThickenError, details: ErrorDetails): ThickenError {
  addDetails(error, details);
  return error;
}

/** Any thrown value as a ThickenError; foreign ones become INTERNAL. */
export function toThickenError(error: unknown): ThickenError {
  if (error instanceof ThickenError) return error;
  // What went wrong first says more than the clean-up that failed after it.
  if (error instanceof Error && error.name === 'SuppressedError' && 'suppressed' in error) {
    return toThickenError(error.suppressed);
  }
  const message = error instanceof Error ? error.message : String(error);
  return new ThickenError('INTERNAL', `${message}; this is a defect of thicken, please report it`, {
    cause: error,
  });
}

function place(details: ErrorDetails): string {
  const parts = [];
  if (details.path !== undefined) parts.push(` on ${JSON.stringify(details.path)}`);
  if (details.length) {
    const first = details.offset ?? 0;
    parts.push(`, bytes ${first} to ${first + details.length - 1}`);
  }
  return parts.join('');
}

export function build(code: string, what: string, remedy: string, details: ErrorDetails = {}) {
  return new ThickenError(code, `${what}${place(details)}; ${remedy}`, details);
}

export function rangeError(what: string, remedy: string, details: ErrorDetails = {}): ThickenError {
  const error = new RangeError(`${what}${place(details)}; ${remedy}`);
  brand(error, 'RANGE', details);
  return error as unknown as ThickenError;
}

export function usageError(what: string, remedy: string, details: ErrorDetails = {}): ThickenError {
  return build('USAGE', what, remedy, details);
}

const REMEDIES: Record<string, string> = {
  ENOENT: 'check the name',
  EACCES: 'run as a user who may open it, or as root',
  EPERM: 'check the file’s attributes (lsattr) and your privileges',
  EROFS: 'remount the file system read-write',
  ENOSPC: 'free some space; what has been allocated stays, and the next run continues',
  EDQUOT: 'raise the quota; what has been allocated stays, and the next run continues',
  EIO: 'check the storage (dmesg)',
  ESTALE: 'let the image be as it is while thicken runs, and run it again',
  EOPNOTSUPP: 'the file system lacks this call; let thicken choose the route',
  ETXTBSY: 'the file is in use as a program or swap file',
  EFBIG: 'the file is too large for this method',
};

const WORDS: Record<string, string> = {
  ENOENT: 'no such file',
  EACCES: 'permission denied',
  EPERM: 'operation not permitted',
  EROFS: 'the file system is read-only',
  ENOSPC: 'no space left on the file system',
  EDQUOT: 'the disk quota is used up',
  ESTALE: 'the image changed its size meanwhile',
  EIO: 'input/output error',
};

/** What the native layer and Node's fs throw: an errno (of either sign) and a system call. */
export interface RawSystemError {
  errno: number;
  syscall?: string;
  offset?: number;
  length?: number;
  message: string;
}

export function isRawSystemError(error: unknown): error is RawSystemError {
  return (
    error instanceof Error &&
    !(error instanceof ThickenError) &&
    typeof (error as { errno?: unknown }).errno === 'number'
  );
}

/** Names by number. Node's own look-up has libuv's names, and lacks some (EDQUOT, ESTALE). */
const ERRNO_NAMES = new Map(
  Object.entries(constants.errno)
    .reverse()
    .map(([name, number]) => [number, name]),
).set(95, 'EOPNOTSUPP');

function errnoName(errno: number): string {
  return ERRNO_NAMES.get(errno) ?? `ERRNO_${errno}`;
}

export function systemError(raw: RawSystemError, path: string): ThickenError {
  const errno = Math.abs(raw.errno);
  const name = errnoName(errno);
  // A changed image is the caller's doing, not the file system's stale handle.
  const code = name === 'ESTALE' ? 'CHANGED' : name;
  const call = raw.syscall ?? 'open';
  const details = { errno, syscall: call, path, offset: raw.offset, length: raw.length };
  const what = `${WORDS[name] ?? name}: ${call}`;
  return build(code, what, REMEDIES[name] ?? 'see the manual page of the call', {
    ...details,
    cause: raw,
  });
}

export const errors = {
  notAnImage: (path: string, what: string) =>
    build(
      what === 'directory' ? 'EISDIR' : 'UNSUPPORTED',
      `a ${what} is no disk image`,
      'name a file or a block device',
      { path },
    ),

  formatRequired: (path: string, probed: string) =>
    build(
      'FORMAT_REQUIRED',
      `the image looks like ${probed}, but a guest can write that into a raw disk`,
      `say --format ${probed} or --format raw`,
      { path },
    ),

  unsupportedFormat: (path: string, format: string) =>
    build(
      'UNSUPPORTED',
      `format ${format} can't be allocated here`,
      format === 'luks'
        ? 'a LUKS container holds data throughout, and needs no key to get storage: say --format raw'
        : 'state it by --format if it lies on another file, or convert it to raw or qcow2',
      { path },
    ),

  qcow2OnDevice: (path: string) =>
    build(
      'UNSUPPORTED',
      'a qcow2 image on a block device can’t be allocated: it has no blocks of its own to reserve',
      'allocate the device as --format raw, or keep the image in a file',
      { path },
    ),

  belowWanted: (path: string) =>
    build(
      'FORMAT_REQUIRED',
      'content comes from a backing file, which is not opened on a header’s word alone',
      'say --format qcow2 if you trust the image',
      { path },
    ),

  needsPopulate: (path: string, offset: number, length: number) =>
    build(
      'NEEDS_POPULATE',
      'content of the range comes from a backing file',
      'say --format qcow2 and leave --route out, then it is copied first; nothing has been changed',
      { path, offset, length },
    ),

  levelForRaw: (path: string, level: string) =>
    usageError(
      `preallocation ${level} does not exist for a raw image or device`,
      'use falloc or full',
      { path },
    ),

  needsWindow: (path: string) =>
    build(
      'NEEDS_WINDOW',
      'QEMU writes no zeros into an image that a guest uses: level full needs the window',
      'ask for falloc, or shut the guest down',
      { path },
    ),

  routeCannot: (route: string, why: string, path: string) =>
    usageError(`route ${route} ${why}`, 'leave --route out to let the plan choose', { path }),

  inUse: (path: string, by: string, remedy: string) =>
    build('IN_USE', `the image is in use by ${by}`, remedy, { path }),

  openedOverAndOver: (path: string) =>
    build(
      'IN_USE',
      'the image is opened over and over by others: nothing gets done between two opens',
      'stop what looks at it that often (a monitor, for one), and run again',
      { path },
    ),

  cannotTellUsers: (path: string, why: string, raw?: RawSystemError) =>
    build(
      'IN_USE',
      `it can't be ruled out that something else writes to the image (${why})`,
      'run as root, or give --exclusive if you know that nothing else uses it',
      { path, errno: raw && Math.abs(raw.errno), syscall: raw?.syscall },
    ),

  noLock: (path: string) =>
    build(
      'IN_USE',
      'NBD has no lock: another client of the export could write what zeros would then replace',
      'give --exclusive if you know that nothing else uses the export',
      { path },
    ),

  readOnlyExport: (path: string) =>
    build('UNSUPPORTED', 'the export is read-only', 'have the server export it writable', { path }),

  noSpace: (path: string, needed: number, available: number, quota: boolean) =>
    build(
      quota ? 'EDQUOT' : 'ENOSPC',
      `${needed} bytes are needed and ${available} are available${quota ? ' under the quota' : ''}: ` +
        `${needed - available} bytes are missing`,
      'free some space or ask for a smaller range; nothing has been changed',
      { path, needed, available },
    ),

  keepFree: (path: string, keepFree: number, available: number) =>
    build(
      'KEEP_FREE',
      `stopped with ${available} bytes free, to keep ${keepFree} of them`,
      'free some space, or lower --keep-free, and run it again: it continues',
      { path, available },
    ),

  cancelled: (path: string) =>
    build('CANCELLED', 'cancelled', 'run it again: it continues where it stopped', { path }),

  changed: (path: string, what: string) =>
    build('CHANGED', `${what}`, 'let the image be as it is while thicken runs, and run it again', {
      path,
    }),

  closed: (path: string) =>
    build('CLOSED', 'the image has been closed', 'open it again', { path }),

  notVerified: (path: string, missing: number, stuck: boolean) =>
    build(
      'NOT_VERIFIED',
      `${missing} bytes of the range still lack storage after the run`,
      stuck
        ? 'no route can give it here (see verify): leave --route out, or allocate the file behind'
        : 'something punched holes meanwhile (a guest’s discard, fstrim): run it again',
      { path },
    ),

  addonLoad: (cause: unknown, facts: string) =>
    build(
      'ADDON_LOAD',
      `the native addon does not load (${cause instanceof Error ? `${cause.message}; ` : ''}${facts})`,
      'rebuild it with `npm rebuild thicken` (it needs python3, make and g++), or install the ' +
        'package on the machine that runs it',
      { cause },
    ),
};
