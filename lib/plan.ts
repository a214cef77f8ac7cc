/**
 * Facts, extents and options in; steps with reasons out. Pure: no input or output, so that a plan
 * can be tested, printed, and computed in passing while pages stream by.
 */
import { errors, usageError } from './errors.js';
import {
  ABSENT,
  BACKED_ZERO,
  BACKED_ZEROED,
  hostOf,
  meetsLevel,
  SHARED,
  STATE_NAMES,
  UNKNOWN,
  UNWRITTEN,
  whyMissing,
  type ExtentPage,
} from './extent.js';
import { KINDS, type PlanFacts, type PlanRequest } from './kinds/index.js';
import { endOf, widen } from './range.js';
import { RangeList } from './range-list.js';
import type { ByteRange, MissingRange, PlanStep, Preallocation, RouteName } from './types.js';

export type { PlanFacts, PlanRequest } from './kinds/index.js';

/** Steps and missing ranges beyond this number are merged with their neighbours. */
const MOST_RANGES = 65_536;

/** What a scan found of a range, measured against a level. All in bytes. */
export interface Survey {
  met: number;
  missing: number;
  /** Missing bytes that will take new host blocks: all with a route but unwritten extents. */
  needed: number;
  /** Bytes, in whole clusters, that are copied from below as content. */
  copied: number;
  /** Number of missing extents that have a place on the host, before any merging. */
  pieces: number;
  shared: number;
  unknown: number;
  /** Host bytes that are not held ready for guest writes. */
  unreserved: number;
  readonly missingRanges: MissingRange[];
  /** Whether `missingRanges` covers no more than what is missing. */
  exact: boolean;
}

export interface PlanPass {
  route: RouteName;
  /** The range around its steps. */
  range: ByteRange;
  bytes: number;
  /** Its steps (offset, length, …); null where they were too many to be listed one by one. */
  ranges: Float64Array | null;
}

export interface Plan {
  readonly steps: PlanStep[];
  /** The routes in the order in which they run. */
  passes: PlanPass[];
  survey: Survey;
}

const LEVELS: Preallocation[] = ['metadata', 'falloc', 'full'];
/** In the order in which they run. */
const ROUTE_ORDER: RouteName[] = [
  'unshare',
  'fallocate',
  'zero-write',
  'device',
  'nbd-write',
  'reserve',
  'populate',
  'stream',
  'qcow2',
];
const FOR_GUESTS = (bytes: number) => `holds ${bytes} bytes too few in reserve for what a guest may write`;
/** Missing states that take no new host blocks when they are dealt with. */
const TAKES_NOTHING = new Set([UNWRITTEN, BACKED_ZERO, BACKED_ZEROED, ABSENT]);

/** The route that gives an extent of this state what the level asks for; null: there is none. */
export function routeFor(state: number, facts: PlanFacts, request: PlanRequest): RouteName | null {
  if (meetsLevel(state, request.level)) return null;
  return KINDS[facts.kind].routeFor(state, facts, request);
}

/** Throws USAGE where the level does not exist for the target, or the route can't bring it. */
export function checkRequest(facts: PlanFacts, request: PlanRequest): void {
  const { route, level } = request;
  const kind = KINDS[facts.kind];
  checkName('preallocation', level, LEVELS);
  if (route !== undefined) {
    checkName('route', route, ROUTE_ORDER);
    if (!kind.routes.includes(route)) {
      throw errors.routeCannot(route, `is not for ${kind.name}`, facts.path);
    }
  }
  kind.check(facts, request);
}

function checkName(what: string, name: string, known: readonly string[]): void {
  if (known.includes(name)) return;
  throw usageError(`${what} ${JSON.stringify(name)} is not known`, `use one of ${known.join(', ')}`);
}

/**
 * Takes pages of extents in ascending order, and tells what to do about them. A process that lives
 * for one allocation plans while its code is still interpreted: what depends on an extent's state
 * alone is looked up, and what nobody asks for is not kept.
 */
export class Planner {
  /** Bytes by state. */
  private readonly bytes = new Float64Array(STATE_NAMES.length);
  private readonly meets: boolean[];
  /** By state; null where there is no route. */
  private readonly routes: (RouteName | null)[];
  private readonly lists: (RangeList | null)[];
  private readonly byRoute = new Map<RouteName, RangeList>();
  private readonly byReason = new Map<string, RangeList>();
  /** By state: whether it is copied as content. */
  private readonly copies: boolean[];
  private readonly copied = new Clusters();
  /** By state: whether an extent that does not meet the level has a place on the host. */
  private readonly placed = STATE_NAMES.map((_, state) => hostOf(state) !== null);
  private pieces = 0;

  /** Without `reasons`, the survey's `missingRanges` stay empty. Throws USAGE. */
  constructor(
    private readonly facts: PlanFacts,
    private readonly request: PlanRequest,
    private readonly reasons = true,
  ) {
    checkRequest(facts, request);
    const states = [...STATE_NAMES.keys()];
    this.meets = states.map((state) => meetsLevel(state, request.level));
    this.routes = states.map((state) => routeFor(state, facts, request));
    this.copies = states.map((state) => KINDS[facts.kind].copies?.(state, facts) ?? false);
    this.lists = this.routes.map((route) => route && listOf(this.byRoute, route));
  }

  add(page: ExtentPage): void {
    const { bytes, meets, placed, copies, lists, reasons } = this;
    const { offset, length, state, flags } = page;
    for (let i = 0; i < state.length; i++) {
      const of = state[i]!;
      bytes[of]! += length[i]!;
      if (meets[of]) continue;
      if (placed[of]) this.pieces++;
      if (copies[of]) this.copied.add(offset[i]!, length[i]!, this.facts.cluster ?? 1);
      lists[of]?.add(offset[i]!, length[i]!);
      if (reasons) listOf(this.byReason, whyMissing(of, flags[i]!)).add(offset[i]!, length[i]!);
    }
  }

  survey(): Survey {
    const { bytes, meets, routes, facts, request } = this;
    const sumOf = (wanted: (state: number) => boolean) =>
      bytes.reduce((total, amount, state) => (wanted(state) ? total + amount : total), 0);
    const lists = [...(this.reasons ? this.byReason : this.byRoute).values()];
    const missingRanges = () => this.missingRanges();
    return {
      met: sumOf((state) => meets[state]!),
      missing: sumOf((state) => !meets[state]!),
      needed:
        KINDS[facts.kind].takes?.(facts, request, bytes) ??
        sumOf((state) => routes[state] !== null && !TAKES_NOTHING.has(state)),
      copied: this.copied.bytes,
      pieces: this.pieces,
      shared: sumOf((state) => hostOf(state) === SHARED),
      unknown: bytes[UNKNOWN]!,
      unreserved: this.unreserved,
      // Only `verify` asks for them, and they may be many.
      get missingRanges() {
        return missingRanges();
      },
      exact: lists.every((list) => list.exact),
    };
  }

  private missingRanges(): MissingRange[] {
    const all = [...this.byReason].flatMap(([why, list]) =>
      list.list().map(({ offset, length }) => ({ offset, length, why })),
    );
    const { unreserved } = this;
    const words = KINDS[this.facts.kind].whyUnreserved?.(unreserved) ?? FOR_GUESTS(unreserved);
    const why = `the host file ${words}`;
    if (unreserved > 0) all.push({ ...this.request.range, why });
    return this.byReason.size > 1 || unreserved > 0 ? all.sort((a, b) => a.offset - b.offset) : all;
  }

  private get unreserved(): number {
    const { facts, request } = this;
    return KINDS[facts.kind].unreserved?.(facts, request) ?? 0;
  }

  private wholes(): PlanPass[] {
    const { facts, request, byRoute } = this;
    const listed = (route: RouteName) => (byRoute.get(route)?.bytes ?? 0) > 0;
    const wholes = KINDS[facts.kind].wholes?.(facts, request, listed, this.bytes) ?? [];
    return wholes.map(({ route, bytes }) => ({ route, range: request.range, bytes, ranges: null }));
  }

  finish(): Plan {
    const wholes = this.wholes();
    const { order = ROUTE_ORDER } = KINDS[this.facts.kind];
    const lists = ROUTE_ORDER.map((route) => [route, this.byRoute.get(route)] as const);
    const whole = (route: RouteName) => wholes.some((pass) => pass.route === route);
    const found = lists.flatMap(([route, list]) => (list?.bytes && !whole(route) ? [{ route, list }] : []));
    let steps: PlanStep[] | undefined;
    const makeSteps = () => [
      ...found.flatMap(({ route, list }) => this.stepsOf(route, list)),
      ...wholes.map(({ route, range }) => this.stepOf(route, range)),
    ];
    return {
      // Made when they are looked at: a run goes by its passes.
      get steps() {
        return (steps ??= makeSteps());
      },
      passes: [...found.map(({ route, list }) => passOf(route, list)), ...wholes].sort(
        (a, b) => order.indexOf(a.route) - order.indexOf(b.route),
      ),
      survey: this.survey(),
    };
  }

  private stepsOf(route: RouteName, list: RangeList): PlanStep[] {
    return list.list().map((range) => this.stepOf(route, range));
  }

  private stepOf(route: RouteName, { offset, length }: ByteRange): PlanStep {
    const { facts, request } = this;
    return { route, offset, length, reason: KINDS[facts.kind].reasonFor(route, facts, request) };
  }
}

/** What extents lie in, ascending: each cluster counts once. */
class Clusters {
  bytes = 0;
  private end = 0;

  add(offset: number, length: number, cluster: number): void {
    const whole = widen({ offset, length }, cluster, Infinity);
    this.bytes += Math.max(0, endOf(whole) - Math.max(this.end, whole.offset));
    this.end = Math.max(this.end, endOf(whole));
  }
}

function passOf(route: RouteName, list: RangeList): PlanPass {
  return { route, range: list.around(), bytes: list.bytes, ranges: list.flat() };
}

function listOf<Key>(lists: Map<Key, RangeList>, key: Key): RangeList {
  let list = lists.get(key);
  if (!list) lists.set(key, (list = new RangeList(MOST_RANGES)));
  return list;
}
