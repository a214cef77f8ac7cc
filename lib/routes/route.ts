/** What every route is: one mechanism that allocates. */
import type { Steered } from '../controls.js';
import type { Descriptor } from '../descriptor.js';
import type { Filesystem } from '../filesystem.js';
import type { CancelFlag, Work } from '../native.js';
import type { AllocationRequest, ByteRange, Preallocation, RouteName } from '../types.js';

/** What a request says that routes need to know. */
export interface RouteRequest {
  level: Preallocation;
  /** The caller's word that nothing else uses the image. */
  exclusive: boolean;
  /** The range of the request, in bytes. */
  range: ByteRange;
  /** Whether free space is watched: then nothing is taken ahead of its chunk. */
  keepsFree: boolean;
  /** As it was asked for. */
  keepFree?: AllocationRequest['keepFree'];
}

/** A file or block device, for routes that change it themselves. */
export interface RouteContext extends RouteRequest {
  /** The image, open for reading; routes open it again as they need it. */
  image: Descriptor;
  /** Bytes. */
  size: number;
  /** null for a device. */
  filesystem: Filesystem | null;
  /** Bytes: the unit in which storage is given. */
  granularity: number;
}

/** How the work of a route is cut into chunks. */
export interface Cut {
  readonly name: RouteName;
  /** Bounds of one chunk. Where they adapt, they start here, and end at `most`. */
  readonly chunk: { bytes: number; ranges: number };
  readonly most: { bytes: number; ranges: number };
  /** Chunks in flight. */
  readonly depth: number;
  /**
   * What adapts to the time that chunks take: their size, the bytes in flight (`window`: chunks that a
   * guest waits for beside each other), their number in flight (`depth`: chunks that a cancel waits for),
   * or nothing.
   */
  readonly adapts: 'size' | 'window' | 'depth' | 'no';
}

/** A mechanism, for a kind of image that `Context` tells of. */
export interface Mechanism<Context> extends Cut {
  /** Takes what the route needs before its first change: locks, descriptors. Throws CANCELLED. */
  open(context: Context, cancel: CancelFlag): Promise<RouteSession>;
}

/** A mechanism for one image. */
export interface Route extends Cut {
  open(cancel: CancelFlag): Promise<RouteSession>;
}

export function routeOf<Context>(mechanism: Mechanism<Context>, context: Context): Route {
  return { ...mechanism, open: (cancel) => mechanism.open(context, cancel) };
}

/** A route at work on one image. Disposing of it gives back all that `open` took. */
export interface RouteSession extends AsyncDisposable {
  /** How its work is cut, where only what `open` found tells that. */
  readonly cut?: Pick<Cut, 'chunk' | 'most' | 'depth'>;
  /**
   * Comes before the first chunk of a run without limits, with all of its ranges: what makes the chunks
   * faster.
   */
  prepare?(ranges: Float64Array, cancel: CancelFlag): Promise<void>;
  /** Gives storage to `ranges` (offset, length, offset, length, …) as far as `cancel` lets it. */
  run(ranges: Float64Array, cancel: CancelFlag): Promise<Work>;
  /** Bytes that it takes of the same file system beside what is still to run. */
  takesBeside?(): Promise<number>;
  /** Makes what was done durable. What is left to take for it is not taken any more after a cancel. */
  sync(cancel: CancelFlag): Promise<void>;
  /**
   * Instead of `run`, where the route takes the whole image, and goes at a pace of its own; `bytes`
   * of it are missing.
   */
  runWhole?(control: WholeControl, bytes: number): Promise<void>;
}

export interface WholeControl {
  signal: AbortSignal;
  limits(): { speed: number; iops: number };
  steer(steered: Steered | undefined): void;
  completed(work: Work): void;
}
