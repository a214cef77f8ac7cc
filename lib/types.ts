/**
 * The plain objects of the public contract. All are JSON, so that a queue, an RPC or a log can
 * carry them. Every offset, length and size is in bytes.
 */

/** How far to go; QEMU's own words. */
export type Preallocation = 'metadata' | 'falloc' | 'full';

export type RouteName =
  | 'fallocate'
  | 'zero-write'
  | 'unshare'
  | 'device'
  | 'nbd-write'
  | 'populate'
  | 'stream'
  | 'reserve'
  | 'qcow2';

export interface ByteRange {
  offset: number;
  length: number;
}

export interface AllocationRequest {
  /** First byte; 0 if absent. */
  offset?: number;
  /** To the end of the image if absent. */
  length?: number;
  /** `falloc` if absent. */
  preallocation?: Preallocation;
  /** Most bytes a second; no limit if absent. */
  speed?: number;
  /** Most requests a second; no limit if absent. */
  iops?: number;
  /** Free space to leave on the file system: bytes, or a percentage of its size as `"10%"`. */
  keepFree?: number | `${number}%`;
  /** One route instead of those that the plan would choose. */
  route?: RouteName;
  /** The caller's word that nothing else uses the image, where that can't be found out. */
  exclusive?: boolean;
  /** Whether the image shall depend on no backing file any more; of the whole image only. */
  dropBacking?: boolean;
}

export interface PlanStep extends ByteRange {
  route: RouteName;
  reason: string;
}

export interface AllocationResult {
  target: string;
  format: string;
  preallocation: Preallocation;
  requested: ByteRange;
  /** The request widened to the granularity, and clipped to the virtual size. */
  effective: ByteRange;
  plan: PlanStep[];
  /** Bytes of `effective` that meet the level; null where the storage can't tell. */
  before: { allocated: number | null };
  after: { allocated: number | null } | null;
  /** Bytes that this run added. */
  allocated: number;
  /** Bytes that met the level already. */
  skipped: number;
  seconds: number;
  /** Read back from the extents after the run; null where the storage can't tell. */
  verified: boolean | null;
  guarantee: boolean;
  warnings: string[];
}

/** A stream that was left to QEMU. */
export interface DetachedResult extends AllocationResult {
  /** The id of its job. */
  job: string;
}

/** How far a run came that was cancelled or failed. */
export interface AllocationDone {
  requested: ByteRange;
  effective: ByteRange;
  before: { allocated: number | null };
  allocated: number;
  skipped: number;
  seconds: number;
}

export interface MissingRange extends ByteRange {
  why: string;
}

export interface Verdict {
  target: string;
  preallocation: Preallocation;
  satisfied: boolean;
  missing: MissingRange[];
  warnings: string[];
}

export interface Progress {
  /** Bytes dealt with so far, of `total`. Counts what has been completed, not what was asked for. */
  position: number;
  total: number;
  route: RouteName;
  /** Bytes a second over the last seconds. */
  rate: number;
  secondsLeft: number | null;
  paused: boolean;
}

export interface ImageInfo {
  target: string;
  kind: 'file' | 'block' | 'qemu' | 'nbd';
  format: string;
  formatBy: 'option' | 'suffix' | 'probe';
  virtualSize: number | null;
  fileSize: number | null;
  hostAllocated: number | null;
  allocated: number | null;
  missing: number | null;
  needed: { metadata: number | null; falloc: number | null; full: number | null };
  granularity: number;
  inUse: { by: string; locks: number[] } | null;
  filesystem: {
    type: string;
    free: number;
    abilities: string[];
    cow: boolean;
    reflinked: boolean | null;
  } | null;
  backing: {
    path: string;
    format: string | null;
    virtualSize: number | null;
    /** Bytes of the image whose content comes from this layer; absent where that is not known. */
    allocated?: number;
  }[];
  snapshots: number;
  warnings: string[];
}

/** One entry of `map --json`: the fields of `qemu-img map --output=json`, and `host`. */
export interface MapEntry {
  start: number;
  length: number;
  depth: number;
  present: boolean;
  zero: boolean;
  data: boolean;
  /** Where it lies in the layer's file, or its external data file; absent for nowhere, or not known. */
  offset?: number;
  host: string;
  /** The layer that has it, where that is not the image itself, and is known. */
  file?: string;
}
