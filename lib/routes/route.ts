/** What every route is: one mechanism that allocates. */
import type { Descriptor } from '../descriptor.js';
import type { Filesystem } from '../filesystem.js';
import type { CancelFlag, Work } from '../native.js';
import type { Preallocation, RouteName } from '../types.js';

export interface RouteContext {
  /** The image, open for reading; routes open it again as they need it. */
  image: Descriptor;
  /** Bytes. */
  size: number;
  level: Preallocation;
  /** null for a device. */
  filesystem: Filesystem | null;
  /** Bytes: the unit in which storage is given. */
  granularity: number;
  /** The caller's word that nothing else uses the image. */
  exclusive: boolean;
}

export interface Route {
  readonly name: RouteName;
  /** Bounds of one chunk. Where they adapt, they start here, and end at `most`. */
  readonly chunk: { bytes: number; ranges: number };
  readonly most: { bytes: number; ranges: number };
  /** Chunks in flight; with more than one, chunks do not adapt to the time that they take. */
  readonly depth: number;
  /** Takes what the route needs before its first change: locks, descriptors. */
  open(context: RouteContext): Promise<RouteSession>;
}

/** A route at work on one image. Disposing of it gives back all that `open` took. */
export interface RouteSession extends AsyncDisposable {
  /** Gives storage to `ranges` (offset, length, offset, length, …) as far as `cancel` lets it. */
  run(ranges: Float64Array, cancel: CancelFlag): Promise<Work>;
  /** Makes what was done durable. */
  sync(): Promise<void>;
}
