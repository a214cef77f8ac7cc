import { setImmediate as turn } from 'node:timers/promises';
import type { CancelFlag, Work } from '../../lib/native.js';
import { runPass, type PassControl, type PassRequest } from '../../lib/pass.js';
import type { Route } from '../../lib/routes/route.js';
import { Throttle } from '../../lib/throttle.js';
import { HOLE, WRITTEN } from '../../lib/extent.js';
import { random } from '../support/patterns.js';
import { pageOf, type Piece } from './pages.js';

export const UNIT = 4096;

export interface ModelOptions {
  seed: number;
  /** For each unit whether it is a hole. */
  holes: boolean[];
  depth: number;
  /** Of a chunk. */
  units: number;
  ranges: number;
  /** The same as `units`, as only the session tells it. */
  sessionUnits?: number;
  /** Bytes that the file system has to give, and those of them to keep. */
  free?: number;
  keepFree?: number;
  /** The chunk, counted from 0, that fails halfway through. */
  failing?: number;
}

/** An image in memory, with a route that allocates it in random time. */
export class PassModel {
  readonly chunks: number[][] = [];
  readonly given: number[];
  readonly works: Work[] = [];
  readonly controller = new AbortController();
  inFlight = 0;
  mostInFlight = 0;
  startedAfterFailure = 0;
  failed = false;
  disposed = 0;
  synced = 0;
  free: number;
  live = false;
  limits = { speed: Infinity, iops: Infinity };
  unpaused: () => Promise<void> = async () => undefined;
  onChunk: () => void = () => undefined;
  private readonly next: () => number;

  constructor(readonly options: ModelOptions) {
    this.next = random(options.seed);
    this.given = options.holes.map(() => 0);
    this.free = options.free ?? Infinity;
  }

  run(change: Partial<PassRequest> = {}): Promise<void> {
    return runPass({ ...this.request(), ...change }, this.control());
  }

  private request(): PassRequest {
    const bounds = { bytes: this.options.units * UNIT, ranges: this.options.ranges };
    const route: Route = {
      name: 'fallocate', chunk: bounds, most: bounds, depth: this.options.depth, adapts: this.options.depth === 1 ? 'size' : 'no', open: async () => this.session(),
    };
    return {
      route,
      source: { pages: () => this.pages() } as unknown as PassRequest['source'],
      path: 'disk',
      granularity: UNIT,
      range: { offset: 0, length: this.options.holes.length * UNIT },
      takes: (state) => state === HOLE,
      known: null,
    };
  }

  private async *pages() {
    const pieces = piecesOf(this.options.holes);
    while (pieces.length > 0) {
      await turn();
      yield pageOf(pieces.splice(0, 1 + (this.next() % 9)));
    }
  }

  private session() {
    const { sessionUnits, ranges, depth } = this.options;
    const chunk = sessionUnits && { bytes: sessionUnits * UNIT, ranges };
    return {
      ...(chunk && { cut: { chunk, most: chunk, depth } }),
      run: (ranges: Float64Array, _cancel: CancelFlag) => this.chunk([...ranges]),
      sync: async () => void this.synced++,
      [Symbol.asyncDispose]: async () => void this.disposed++,
    };
  }

  private async chunk(ranges: number[]): Promise<Work> {
    const index = this.chunks.push(ranges) - 1;
    if (this.failed) this.startedAfterFailure++;
    this.mostInFlight = Math.max(this.mostInFlight, ++this.inFlight);
    this.onChunk();
    const early = this.next() % 2 === 0;
    if (early) this.giveAll(ranges);
    for (let turns = this.next() % 4; turns > 0; turns--) await turn();
    this.inFlight--;
    if (index === this.options.failing) this.fail(ranges);
    if (!early) this.giveAll(ranges);
    return { allocated: bytesOf(ranges), skipped: 0, requests: ranges.length / 2, cancelled: false, disturbed: false };
  }

  private fail(ranges: number[]): never {
    this.failed = true;
    const partial = { allocated: Math.floor(bytesOf(ranges) / 2), skipped: 0, requests: 1, cancelled: false, disturbed: false };
    throw Object.assign(new Error('chunk failed'), { cause: { partial } });
  }

  private giveAll(ranges: number[]): void {
    for (let i = 0; i < ranges.length; i += 2) {
      const end = ranges[i]! + ranges[i + 1]!;
      for (let at = ranges[i]!; at < end; at += UNIT) this.given[at / UNIT]!++;
    }
    this.free -= bytesOf(ranges);
  }

  private control(): PassControl {
    const keepFree = this.options.keepFree ?? 0;
    return {
      signal: this.controller.signal,
      cancel: { cancel: () => undefined },
      throttle: new Throttle(Infinity, Infinity),
      limits: () => this.limits,
      unpaused: () => this.unpaused(),
      steer: () => undefined,
      room: async () => ({ bytes: this.free - keepFree, available: this.free, keepFree }),
      live: () => Promise.resolve(this.live),
      completed: (work) => void this.works.push(work),
    };
  }
}

function piecesOf(holes: boolean[]): Piece[] {
  const pieces: Piece[] = [];
  holes.forEach((hole, unit) => {
    const state = hole ? HOLE : WRITTEN;
    const last = pieces.at(-1);
    if (last?.state === state) last.length += UNIT;
    else pieces.push({ offset: unit * UNIT, length: UNIT, state });
  });
  return pieces;
}

export function bytesOf(ranges: readonly number[]): number {
  return ranges.reduce((sum, value, i) => (i % 2 ? sum + value : sum), 0);
}
