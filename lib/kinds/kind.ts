/** What a plan needs to know of a kind of image: its levels, its routes, and when which one serves. */
import type { ByteRange, Preallocation, RouteName } from '../types.js';

export interface PlanFacts {
  path: string;
  /**
   * `guest`: an image in a format, changed by the QEMU that has it open; `qcow2`: one at rest, which
   * thicken changes itself; `stored`: one at rest of another format, changed by a storage daemon.
   */
  kind: 'file' | 'block' | 'guest' | 'qcow2' | 'stored' | 'nbd';
  /** What the file system is believed to do; of an NBD server, whether it can be told to allocate. */
  abilities: { fallocate: boolean; unshare: boolean };
  /** Whether there is a backing file. */
  readonly backed?: boolean;
  /** Whether what lies below is open, by the caller's word. */
  readonly opened?: boolean;
  /** Whether clusters are mapped in parts: a block-stream from within one ends QEMU (7.2). */
  subclusters?: boolean;
  /** Host bytes that guest writes may need, and that nothing holds ready; null: can't be told. */
  unreserved?: number | null;
  /** Bytes that the request takes of the file system, where the image's own tables tell. */
  takes?: number | null;
  /** Bytes that the image counts as used, and nothing uses: an earlier run was cut short. */
  leaked?: number;
  /** Bytes of a cluster, where content from below is copied in whole ones. */
  cluster?: number;
  /** Whether the format can say that a cluster reads as zeros. */
  tellsZeros?: boolean;
}

export interface PlanRequest {
  /** Bytes; already widened to the granularity. */
  range: ByteRange;
  level: Preallocation;
  /** Instead of the plan's choice. */
  route?: RouteName | undefined;
  dropBacking?: boolean;
}

/** What concerns the image as a whole. */
export interface Whole {
  route: RouteName;
  bytes: number;
}

export interface Kind {
  /** For people. */
  readonly name: string;
  readonly routes: readonly RouteName[];
  /** Throws USAGE where level or route is nothing for this kind, both being known names. */
  check(facts: PlanFacts, request: PlanRequest): void;
  /** The route for an extent whose state does not meet the level; null: there is none. */
  routeFor(state: number, facts: PlanFacts, request: PlanRequest): RouteName | null;
  /** Why one of its routes is taken, for people. */
  reasonFor(route: RouteName, facts: PlanFacts, request: PlanRequest): string;
  /** Bytes that are not held ready for guest writes, where the request asks for that. */
  unreserved?(facts: PlanFacts, request: PlanRequest): number;
  /** What the host file then does or lacks, for people. */
  whyUnreserved?(bytes: number): string;
  /** The order in which its routes run, where that is another than usual. */
  readonly order?: readonly RouteName[];
  /**
   * What is to be done beside the extents; `listed`: whether a route has some of them;
   * `bytes`: how much there is, by state. Instead of a route's list, where it has one.
   */
  wholes?(
    facts: PlanFacts,
    request: PlanRequest,
    listed: (route: RouteName) => boolean,
    bytes: Float64Array,
  ): Whole[];
  /** Whether a cluster with an extent of this state takes storage as a whole when it is copied. */
  copies?(state: number, facts: PlanFacts): boolean;
  /** Bytes of new host blocks; null: all that is missing and has a route. `bytes`: by state. */
  takes?(facts: PlanFacts, request: PlanRequest, bytes: Float64Array): number | null;
}
