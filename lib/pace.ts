/** How large a chunk is, and how fast a run goes. Pure but for the numbers that it is told. */
import { roundDown } from './range.js';

/** Nothing that holds a guest's I/O up may take longer than 100 ms: room for a disk that stalls. */
const AIM_MS = 25;
/** A limited run is cut so finely that pausing and changes of speed take effect at once. */
const LIMITED_SECONDS = 0.05;

export interface ChunkBounds {
  bytes: number;
  ranges: number;
}

/** How large chunks are, and how many may be in flight. */
export interface Pace {
  /** Whether a guest that uses the image gets time between chunks. */
  readonly rests: boolean;
  /** Bounds of the next chunk, at most `speed` bytes and `iops` requests a second in mind. */
  bounds(speed: number, iops: number): ChunkBounds;
  /** Whether one more chunk may start beside those in flight. */
  admits(chunks: number, bytes: number): boolean;
  /** A chunk took so long, with so many in flight, itself among them. */
  note(milliseconds: number, chunks: number): void;
}

export interface PaceOptions {
  /** What to start with. */
  chunk: ChunkBounds;
  most: ChunkBounds;
  depth: number;
  adapts: 'size' | 'window' | 'depth' | 'no';
}

export function paceFor(options: PaceOptions, granularity: number): Pace {
  if (options.adapts === 'window') return new WindowPace(options, granularity);
  if (options.adapts === 'depth') return new DepthPace(options, granularity);
  return new SizePace(options, granularity);
}

function limited(bytes: number, ranges: number, unit: number, speed: number, iops: number): ChunkBounds {
  const most = Math.min(bytes, speed * LIMITED_SECONDS);
  return {
    bytes: Math.max(unit, roundDown(Math.floor(most), unit)),
    ranges: Math.max(1, Math.floor(Math.min(ranges, iops * LIMITED_SECONDS))),
  };
}

/** Grows chunks while they are short, and shrinks them when they take long, if asked to. */
class SizePace implements Pace {
  private now: ChunkBounds;
  private readonly adapts: boolean;
  readonly rests: boolean;

  constructor(
    private readonly options: PaceOptions,
    private readonly granularity: number,
  ) {
    this.now = { ...options.chunk };
    this.adapts = options.adapts === 'size';
    this.rests = this.adapts;
  }

  admits(chunks: number): boolean {
    return chunks < this.options.depth;
  }

  note(milliseconds: number): void {
    if (!this.adapts) return;
    if (milliseconds > AIM_MS) this.scale(Math.max(0.1, AIM_MS / milliseconds / 2));
    else if (milliseconds < AIM_MS / 2) this.scale(2);
  }

  private scale(factor: number): void {
    const { most } = this.options;
    this.now = {
      bytes: Math.min(most.bytes, Math.max(this.granularity, this.now.bytes * factor)),
      ranges: Math.min(most.ranges, Math.max(1, Math.floor(this.now.ranges * factor))),
    };
  }

  bounds(speed: number, iops: number): ChunkBounds {
    return limited(this.now.bytes, this.now.ranges, this.granularity, speed, iops);
  }
}

/** A chunk is at most this part of what may be in flight, so that some are under way at a time. */
const CHUNKS_IN_WINDOW = 4;
/** And no larger than this while the depth lets enough of them be in flight. */
const USUAL_CHUNK = 2 ** 20;
const ALONE_MARGIN = 1.25;
/** A guest's write waits for what is in flight, and then for storage that is not the fastest. */
const QUEUED_MS = 15;
/**
 * In flight, it keeps a local disk busy; what is beyond it only queues up, in QEMU's memory. Eight
 * chunks of 1 MiB took 1.3 times as long as four, to and from memory (QEMU 7.2).
 */
const BUSY_BYTES = 4 * USUAL_CHUNK;
/** Where a chunk takes no longer than this by then, 400 MB/s and more are under way: enough. */
const FAST_MS = 10;
const BUSY_MARGIN = 1.25;
const SMOOTHING = 1 / 8;

/**
 * Bounds the bytes in flight, so that each chunk takes about as long as is aimed at, however slow
 * the storage is: what waits for a chunk waits no longer. By Little's law the time is the window
 * over the rate: where a larger window makes chunks slower, it has made nothing faster.
 */
class WindowPace implements Pace {
  readonly rests = false;
  private window: number;
  /** What the smallest chunk takes by itself: a smaller window would not make it less. */
  private alone = 0;
  /** What a chunk took lately while the window was just large enough for a local disk. */
  private busy: number | undefined;
  private readonly most: number;

  constructor(
    private readonly options: PaceOptions,
    private readonly granularity: number,
  ) {
    this.window = options.chunk.bytes;
    this.most = options.most.bytes * options.depth;
  }

  admits(chunks: number, bytes: number): boolean {
    return chunks === 0 || (chunks < this.options.depth && bytes < this.window);
  }

  note(milliseconds: number, chunks: number): void {
    const single = chunks === 1 && this.window <= this.granularity;
    this.alone = single ? milliseconds : Math.min(this.alone, milliseconds);
    const factor = Math.min(2, Math.max(0.5, this.aimAt(milliseconds) / Math.max(1, milliseconds)));
    // All that are in flight together change it once.
    const changed = this.window * factor ** (1 / chunks);
    const most = (this.busy ?? 0) < FAST_MS ? Math.min(this.most, BUSY_BYTES) : this.most;
    this.window = Math.min(most, Math.max(this.granularity, changed));
  }

  private aimAt(milliseconds: number): number {
    const aim = Math.max(QUEUED_MS, this.alone * ALONE_MARGIN);
    if (this.window > BUSY_BYTES) return Math.min(aim, (this.busy ?? milliseconds) * BUSY_MARGIN);
    this.busy ??= milliseconds;
    this.busy += (milliseconds - this.busy) * SMOOTHING;
    return aim;
  }

  bounds(speed: number, iops: number): ChunkBounds {
    const { most, depth } = this.options;
    const usual = Math.min(USUAL_CHUNK, this.window / CHUNKS_IN_WINDOW);
    const bytes = Math.min(most.bytes, Math.max(usual, this.window / depth));
    return limited(bytes, most.ranges, this.granularity, speed, iops);
  }
}

/** What is in flight takes no longer, as far as fewer chunks make it shorter: a cancel waits for it. */
const WAIT_MS = 1000;
/** Storage with latency is kept busy by two at least. */
const LEAST_DEPTH = 2;

/**
 * As many chunks of one size as storage gets through in a second, and two. Smaller ones would not be faster
 * where each request takes its time, whatever its size (a server that answers one at a time).
 */
class DepthPace implements Pace {
  readonly rests = false;
  private depth = LEAST_DEPTH;

  constructor(
    private readonly options: PaceOptions,
    private readonly granularity: number,
  ) {}

  admits(chunks: number): boolean {
    return chunks < this.depth;
  }

  note(milliseconds: number, chunks: number): void {
    const fewer = Math.floor((chunks * WAIT_MS) / Math.max(1, milliseconds));
    this.depth = milliseconds <= WAIT_MS ? this.depth + 1 : Math.min(this.depth, Math.max(LEAST_DEPTH, fewer));
    this.depth = Math.min(this.options.depth, this.depth);
  }

  bounds(speed: number, iops: number): ChunkBounds {
    const { bytes, ranges } = this.options.chunk;
    return limited(bytes, ranges, this.granularity, speed, iops);
  }
}

const WINDOW_MS = 3000;

/** Bytes a second over the last seconds. */
export class RateMeter {
  private samples: { at: number; position: number }[] = [];

  note(at: number, position: number): number {
    this.samples.push({ at, position });
    while (this.samples.length > 2 && at - this.samples[0]!.at > WINDOW_MS) this.samples.shift();
    const first = this.samples[0]!;
    return at > first.at ? ((position - first.position) / (at - first.at)) * 1000 : 0;
  }
}
