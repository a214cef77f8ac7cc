/** The addon's functions, typed. */
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import process, { arch, platform, versions } from 'node:process';
import { fileURLToPath } from 'node:url';
import { errors, type ThickenError } from './errors.js';
import type { ExtentPage } from './extent.js';

export interface CancelFlag {
  cancel(): void;
  /** Aborts with it, for what waits for an answer and polls nothing. */
  readonly signal?: AbortSignal;
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
  /**
   * Opens the same file once more, which `settle` allows for. Rejects as the functions of `Native` do,
   * and `settle` may then say no. One at a time. What is open is closed with the gate, or the environment.
   */
  open(fd: number, flags: number): Promise<number>;
  closeOpened(fd: number): Promise<void>;
  /** Whether nobody has opened since `reset` but `open`; if so, the gate is open again. */
  settle(): boolean;
  /** If not, somebody who opened within the system call of `open` may have gone unseen. */
  knowsOpeners(): boolean;
  disturbed(): boolean;
  close(): Promise<void>;
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

/** How work on a qcow2 image ended: `code` is OK, or why it was refused (native/qcow2/outcome.h). */
export interface Qcow2Outcome {
  code: string;
  /** What is wrong and what to do about it, without the file's name. */
  message: string;
  /** The bytes of the file that it is about; a `size` of 0 where there are none. */
  at: number;
  size: number;
}

/** An image's header and first-level tables, in native memory. */
export interface Qcow2Tables {
  close(): void;
}

/** An allocation in place that is under way. One call at a time. */
export interface Qcow2Session {
  close(): void;
}

export interface Qcow2Facts extends Qcow2Outcome {
  /** Whether the image may be written to: the dirty and corrupt bits. */
  writable: Qcow2Outcome;
  version: number;
  /** Bytes. */
  clusterSize: number;
  virtualSize: number;
  fileSize: number;
  snapshots: number;
  bitmaps: number;
  encrypted: boolean;
  extended: boolean;
  externalData: boolean;
  backed: boolean;
  /** As they stand in the image. */
  backingFile: string | null;
  backingFormat: string | null;
  dataFile: string | null;
}

/** What a qcow2 image consists of; `dataFd` is -1 where its external data file is not open. */
export interface HostFiles {
  fd: number;
  /** Index into EXTENT_METHODS. */
  method: number;
  dataFd: number;
  dataMethod: number;
}

export interface Qcow2Request {
  /** Bytes. */
  offset: number;
  length: number;
  /** Index into QCOW2_LEVELS. */
  level: number;
  /** Guest offset from which on nothing comes from the backing file. */
  backingEnd: number;
  /** The caller writes zeros to all that has no blocks afterwards. */
  zerosFollow: boolean;
  /** In whole clusters: what QEMU copies into the image before, where it puts that itself. */
  copied: number;
}

export const QCOW2_LEVELS = ['metadata', 'falloc', 'full'] as const;

/** All in bytes. */
export interface Qcow2Needs extends Qcow2Outcome {
  cancelled: boolean;
  clusterSize: number;
  /** New clusters. */
  data: number;
  tables: number;
  refcounts: number;
  /** Behind `fileEnd`, for clusters that a later write must move. */
  reserve: number;
  /** In use before, leaks included. */
  counted: number;
  /** What an outgrown table gives back. */
  freed: number;
  fileEnd: number;
  /** New blocks of the host: the container's, and the external data file's. */
  fileNeeds: number;
  dataNeeds: number;
  /** That part of `fileNeeds` which the finish takes: for tables in holes, and the reserve. */
  later: number;
  /** Blocks that the tables and the reserve lack, as the file is now. */
  unreserved: number;
  /** What other files share of guest clusters, of the data file, of the tables: in none of the above. */
  sharedFile: number;
  sharedData: number;
  sharedTables: number;
  /** Clusters that are made zeros before the tables call them data, but for what reads as zeros. */
  stale: number;
  /** Clusters that a snapshot shares, of which a part stays marked as zeros. */
  mixed: number;
  /** Counted, and used by nothing. */
  surplus: number;
}

export interface Qcow2Writers {
  bufferedFd: number;
  directFd: number;
  directAlignment: number;
  gate: OpenGate;
}

export interface Qcow2Progress extends Qcow2Outcome {
  /** Guest offset where to go on. */
  next: number;
  mapped: number;
  /** Bytes that tables and counts of the request are still to take. */
  beside: number;
  /** Nothing of this piece was mapped. */
  cancelled: boolean;
  /** False where the file system has no fallocate(2). */
  reserved: boolean;
  /** Nor then: somebody opened the image. */
  disturbed: boolean;
}

/**
 * All functions but the classes and peerCredentials run on the addon's own threads, and reject with an error that
 * carries errno, syscall, offset, length, and `partial`: the result as far as it came. The caller
 * keeps the descriptors open until the promise settles.
 */
export interface Native {
  CancelFlag: new () => CancelFlag;
  OpenGate: new () => OpenGate;
  Qcow2Tables: new () => Qcow2Tables;
  Qcow2Session: new () => Qcow2Session;
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
  /** Reads header and first-level tables into `tables`, which stay empty where they are refused. */
  openQcow2(tables: Qcow2Tables, fd: number, cancel?: CancelFlag): Promise<Qcow2Facts>;
  /** States from FIRST_MAPPED on (mapped.ts). `fd` is what the tables were read from. */
  readQcow2(
    tables: Qcow2Tables,
    files: HostFiles,
    offset: number,
    end: number,
    maxExtents: number,
    cancel?: CancelFlag,
  ): Promise<Qcow2Outcome & ExtentPage & { host: Float64Array; next: number }>;
  /** Whether the file has fewer blocks (`hostBytes`) than clusters in use. */
  looksPreallocatedQcow2(tables: Qcow2Tables, fd: number, hostBytes: number): Promise<boolean>;
  /** Reads the image afresh, checks all of it, and finds out what the request takes. */
  prepareQcow2(
    session: Qcow2Session,
    files: HostFiles,
    request: Qcow2Request,
    cancel?: CancelFlag,
  ): Promise<Qcow2Needs>;
  /** Allocates the beginning of a part of the request, and tells how far it came. */
  allocateQcow2(
    session: Qcow2Session,
    writers: Qcow2Writers,
    dataWriters: Qcow2Writers | undefined,
    offset: number,
    length: number,
    cancel?: CancelFlag,
  ): Promise<Qcow2Progress>;
  /** Frees what leaked, gives tables blocks, reserves what later writes need, and syncs; cancelled, it takes nothing. */
  finishQcow2(
    session: Qcow2Session,
    writers: Qcow2Writers,
    dataWriters: Qcow2Writers | undefined,
    cancel?: CancelFlag,
  ): Promise<Qcow2Progress>;
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
    /** Clusters that QEMU has the host zero when a part is written: with storage, and without. */
    marked: number;
    bare: number;
  }>;
  /** Of a connected UNIX socket. At once; throws an error with an errno. `pid` is 0 where it can't be seen. */
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
  // The same from here and from each folder that scripts/setup.mjs builds.
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
