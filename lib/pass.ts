/** One route over the extents of one range: chunks, in flight within bounds, under the throttle. */
import { errors } from './errors.js';
import type { ExtentSource } from './extent-source.js';
import type { CancelFlag, Work } from './native.js';
import { paceFor, type ChunkBounds, type Pace } from './pace.js';
import type { ExtentPage } from './extent.js';
import { clip, roundDown } from './range.js';
import { bytesOf, RangeQueue } from './range-queue.js';
import { partialOf } from './outcomes.js';
import type { Route, RouteSession, WholeControl } from './routes/route.js';
import type { Room } from './space.js';
import { systemClock, type Throttle } from './throttle.js';
import type { ByteRange } from './types.js';

/** `limits`: bytes and requests a second as they are now; Infinity for no limit. */
export interface PassControl extends WholeControl {
  cancel: CancelFlag;
  throttle: Throttle;
  /** Resolves when the run is not paused. */
  unpaused(): Promise<void>;
  /** Space for `wanted` bytes more, as far as there is. */
  room(wanted: number): Promise<Room>;
  /** Whether others use the image, and want time between chunks. */
  live(): Promise<boolean>;
}

export interface PassRequest {
  path: string;
  route: Route;
  source: ExtentSource;
  /** Bytes. */
  granularity: number;
  range: ByteRange;
  /** Whether an extent of this state is the route's to deal with. */
  takes(state: number): boolean;
  /** What those extents are (offset, length, …), where they are known; else they are read again. */
  known: Float64Array | null;
}

/** Rejects with the first error, when nothing is in flight any more. */
export async function runPass(request: PassRequest, control: PassControl): Promise<void> {
  const session = await request.route.open(control.cancel);
  try {
    if (session.runWhole) return await session.runWhole(control, request.known ? bytesOf(request.known) : 0);
    await prepare(session, request, control);
    const chunks = new Chunks(request, session, control, await control.live());
    try {
      await chunks.runAll();
    } finally {
      await chunks.settle();
    }
    chunks.throwFailure();
    await session.sync(control.cancel);
  } finally {
    await session[Symbol.asyncDispose]();
  }
}

async function prepare(session: RouteSession, { known }: PassRequest, control: PassControl): Promise<void> {
  await control.unpaused();
  const { speed, iops } = control.limits();
  if (known && speed === Infinity && iops === Infinity) await session.prepare?.(known, control.cancel);
}

/** The first chunks beside a guest: 256 gaps took 1 ms where 100,000 held its writes up for 0.5 s. */
const LIVE_START: ChunkBounds = { bytes: 64 * 2 ** 20, ranges: 256 };

function smaller(a: ChunkBounds, b: ChunkBounds): ChunkBounds {
  return { bytes: Math.min(a.bytes, b.bytes), ranges: Math.min(a.ranges, b.ranges) };
}

class Chunks {
  private readonly pace: Pace;
  private readonly inFlight = new Set<Promise<void>>();
  private bytesInFlight = 0;
  private failure: { error: unknown } | undefined;
  private readonly pending = new RangeQueue();

  constructor(
    private readonly request: PassRequest,
    private readonly session: RouteSession,
    private readonly control: PassControl,
    live: boolean,
  ) {
    const { granularity } = request;
    const route = { ...request.route, ...session.cut };
    const chunk = live ? smaller(route.chunk, LIVE_START) : route.chunk;
    this.pace = paceFor({ ...route, chunk }, granularity);
  }

  async runAll(): Promise<void> {
    for await (const ranges of this.wanted()) {
      this.pending.add(ranges);
      while (this.pending.fills(this.bounds()) && !this.stopped()) await this.dispatch();
    }
    while (this.pending.bytes > 0 && !this.stopped()) await this.dispatch();
  }

  private async *wanted(): AsyncGenerator<Float64Array, void, undefined> {
    const { known, source, range } = this.request;
    if (known) return yield known;
    for await (const page of source.pages(range, this.control.cancel)) {
      if (this.stopped()) return;
      yield this.takenOf(page);
    }
  }

  private takenOf({ offset, length, state }: ExtentPage): Float64Array {
    const taken: number[] = [];
    for (let i = 0; i < state.length; i++) {
      if (!this.request.takes(state[i]!)) continue;
      const part = clip({ offset: offset[i]!, length: length[i]! }, this.request.range);
      taken.push(part.offset, part.length);
    }
    return new Float64Array(taken);
  }

  private stopped(): boolean {
    return this.control.signal.aborted || this.failure !== undefined;
  }

  private bounds(): ChunkBounds {
    const { speed, iops } = this.control.limits();
    return this.pace.bounds(speed, iops);
  }

  /** Sends a chunk on its way, once the depth, the throttle and the space allow it. */
  private async dispatch(): Promise<void> {
    const { control } = this;
    while (!this.pace.admits(this.inFlight.size, this.bytesInFlight)) {
      await Promise.race(this.inFlight);
    }
    const cut = this.pending.take(this.bounds());
    await control.throttle.take(bytesOf(cut), cut.length / 2, control.signal);
    await control.unpaused();
    if (this.stopped()) return;
    // Last: what is free may have changed while the run waited.
    const elapsed = this.start(await this.withinRoom(cut));
    // A guest gets its time now; else the next chunk is put together meanwhile.
    const rests = this.pace.rests && (await control.live());
    if (rests) await systemClock.sleep(await elapsed, control.signal);
  }

  /**
   * As much of a chunk as may be allocated; the rest is pending again. Throws KEEP_FREE if nothing
   * may.
   */
  private async withinRoom(chunk: Float64Array): Promise<Float64Array> {
    const { path, granularity } = this.request;
    const wanted = bytesOf(chunk);
    let room = await this.roomFor(wanted);
    // Chunks in flight may have got some of their blocks already: only at rest the count is exact.
    while (this.inFlight.size > 0 && room.bytes - this.bytesInFlight < wanted) {
      await Promise.race(this.inFlight);
      room = await this.roomFor(wanted);
    }
    const left = room.bytes - this.bytesInFlight;
    if (left >= wanted) return chunk;
    const most = roundDown(left, granularity);
    if (most <= 0) throw errors.keepFree(path, room.keepFree, room.available);
    this.pending.putBack(chunk);
    return this.pending.take({ bytes: most, ranges: Infinity });
  }

  /** Without what the route takes beside its ranges. */
  private async roomFor(wanted: number): Promise<Room> {
    const beside = (await this.session.takesBeside?.()) ?? 0;
    const room = await this.control.room(wanted + this.bytesInFlight + beside);
    return { ...room, bytes: room.bytes - beside };
  }

  /** Resolves with the milliseconds that the chunk took; failures are kept for later. */
  private start(ranges: Float64Array): Promise<number> {
    const bytes = bytesOf(ranges);
    this.bytesInFlight += bytes;
    const began = systemClock.now();
    const chunk = this.session
      .run(ranges, this.control.cancel)
      .catch((error: unknown) => this.fail(error))
      .then((work) => {
        this.bytesInFlight -= bytes;
        this.inFlight.delete(settled);
        const elapsed = systemClock.now() - began;
        this.pace.note(elapsed, this.inFlight.size + 1);
        this.complete(work);
        return elapsed;
      });
    const settled: Promise<void> = chunk.then(() => undefined);
    this.inFlight.add(settled);
    return chunk;
  }

  /** A listener of the caller's may throw here. */
  private complete(work: Work): void {
    try {
      this.control.completed(work);
    } catch (error) {
      this.failure ??= { error };
    }
  }

  /** What a failed chunk did until then still counts. */
  private fail(error: unknown): Work {
    this.failure ??= { error };
    return partialOf(error);
  }

  async settle(): Promise<void> {
    await Promise.all(this.inFlight);
  }

  throwFailure(): void {
    if (this.failure) throw this.failure.error;
  }
}
