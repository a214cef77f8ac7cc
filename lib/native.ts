/** The addon's functions, typed. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import process, { arch, platform, versions } from 'node:process';
import { fileURLToPath } from 'node:url';
import { errors, type ThickenError } from './errors.js';
import type { ExtentPage } from './extent.js';

export interface CancelFlag {
  cancel(): void;
}

/** What a bounded piece of work did. */
export interface Work {
  /** Bytes. */
  allocated: number;
  skipped: number;
  requests: number;
  cancelled: boolean;
  /** Ended early because somebody opened the image. */
  disturbed: boolean;
}

export const NO_WORK: Work = {
  allocated: 0,
  skipped: 0,
  requests: 0,
  cancelled: false,
  disturbed: false,
};

/** Stops the writing of zeros when somebody opens one of the inodes that it watches. */
export interface OpenGate {
  /** Throws an error with an errno. */
  watch(fd: number): void;
  reset(): void;
  /** Whether there were just `own` opens since `reset`; if so, the gate is open again. */
  settle(own: number): boolean;
  disturbed(): boolean;
  close(): void;
}

/** The order is that of `ExtentMethod` in native/extents.h. */
export const EXTENT_METHODS = ['fiemap', 'seek', 'fibmap', 'pages'] as const;
export type ExtentMethod = (typeof EXTENT_METHODS)[number];

export const FALLOCATE_RESERVE = 0;
export const FALLOCATE_UNSHARE = 1;
export const SYNC_FILE = 0;
export const SYNC_DATA = 1;
export const SYNC_FILESYSTEM = 2;
export const DEVICE_ZERO_OUT = 0;
export const DEVICE_WRITE = 1;

export interface ZeroWriteOptions {
  gate: OpenGate;
  bufferedFd: number;
  /** Opened with O_DIRECT; -1 for none. */
  directFd: number;
  directAlignment: number;
  directMinimum: number;
  granularity: number;
  expectedSize: number;
  /** What an earlier call wrote, and is to be on the disk when this one is done. */
  settleOffset: number;
  settleLength: number;
}

/**
 * All functions but the classes and peerCredentials run on the addon's own threads, and reject with an error that
 * carries errno, syscall, offset, length, and `partial`: the result as far as it came. The caller
 * keeps the descriptors open until the promise settles.
 */
export interface Native {
  CancelFlag: new () => CancelFlag;
  OpenGate: new () => OpenGate;
  readExtents(
    fd: number,
    method: number,
    offset: number,
    end: number,
    maxExtents: number,
    cancel?: CancelFlag,
  ): Promise<ExtentPage & { next: number }>;
  /** `ranges`: offset, length, offset, length, …. */
  fallocate(
    fd: number,
    mode: number,
    expectedSize: number,
    rangesPerCall: number,
    ranges: Float64Array,
    cancel?: CancelFlag,
  ): Promise<Work>;
  zeroWrite(options: ZeroWriteOptions, ranges: Float64Array, cancel?: CancelFlag): Promise<Work>;
  deviceFacts(fd: number): Promise<{
    size: number;
    logicalSector: number;
    physicalSector: number;
    readOnly: boolean;
  }>;
  loopFacts(fd: number): Promise<{
    device: number;
    inode: number;
    /** Of a loop over a block device: its number. */
    blockDevice: number;
    offset: number;
    sizeLimit: number;
  } | null>;
  allocateDevice(
    fd: number,
    mode: number,
    granularity: number,
    gate: OpenGate,
    ranges: Float64Array,
    cancel?: CancelFlag,
  ): Promise<Work>;
  fileFacts(fd: number): Promise<{
    blockSize: number;
    inodeFlags: number | null;
    directMemory: number;
    directOffset: number;
  }>;
  syncFile(fd: number, scope: number): Promise<void>;
  btrfsQuota(fd: number): Promise<number | null>;
  takeLocks(fd: number, bytes: number[]): Promise<void>;
  releaseLocks(fd: number, bytes: number[]): Promise<void>;
  probeLocks(fd: number, bytes: number[]): Promise<number[]>;
  probeWriter(fd: number): Promise<boolean>;
  /** Of a connected UNIX socket. At once; throws an error with an errno. `pid` is 0 where it can't be seen. */
  /** What full allocation of a qcow2 image takes; reads only. `code` is OK, or why it can't be told. */
  measureQcow2(
    fd: number,
    cancel?: CancelFlag,
  ): Promise<{
    code: string;
    message: string;
    clusterSize: number;
    /** Bytes: where the file ends then. */
    fileEnd: number;
    /** Bytes behind that, for clusters that a write must move. */
    reserve: number;
  }>;
  peerCredentials(fd: number): { pid: number; uid: number; gid: number };
}

/** Where a build from source is, and where the package carries one for each processor. */
const PLACES = ['build/Release/thicken.node', `prebuilds/linux-${arch}/thicken.node`];

let loaded: Native | undefined;
let failure: ThickenError | undefined;

/** Throws ADDON_LOAD, with a diagnosis and the remedy. */
export function native(): Native {
  if (loaded) return loaded;
  throw failure ?? errors.addonLoad(undefined, 'not loaded');
}

function load(): void {
  const root = fileURLToPath(new URL('..', import.meta.url));
  // THICKEN_ADDON names a build of another kind: with sanitizers, say.
  const given = process.env['THICKEN_ADDON'];
  const places = given ? [given] : PLACES.map((place) => join(root, place));
  const found = places.find((place) => existsSync(place));
  const facts = `${platform} ${arch}, Node ${versions.node}, looked for ${places.join(' and ')}`;
  if (!found) {
    failure = errors.addonLoad(undefined, facts);
    return;
  }
  const module = { exports: {} };
  try {
    process.dlopen(module, found);
    loaded = module.exports as Native;
  } catch (cause) {
    failure = errors.addonLoad(cause, facts);
  }
}

// With the module, so that the first use of the library does not pay for it; a failure is told to
// whoever uses it, since an import that throws can't be caught where it matters.
load();
