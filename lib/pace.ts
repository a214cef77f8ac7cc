/** How large a chunk is, and how fast a run goes. Pure but for the numbers that it is told. */
import { roundDown } from './range.js';

/** Nothing that holds a guest's I/O up may take longer than 100 ms; half of it is aimed at. */
const AIM_MS = 50;
/** A limited run is cut so finely that pausing and changes of speed take effect at once. */
const LIMITED_SECONDS = 0.05;

export interface ChunkBounds {
  bytes: number;
  ranges: number;
}

/** Grows chunks while they are short, and shrinks them when they take long. */
export class ChunkSize {
  private now: ChunkBounds;

  constructor(
    start: ChunkBounds,
    private readonly most: ChunkBounds,
    private readonly granularity: number,
  ) {
    this.now = { ...start };
  }

  note(milliseconds: number): void {
    if (milliseconds > AIM_MS) this.scale(Math.max(0.1, AIM_MS / milliseconds / 2));
    else if (milliseconds < AIM_MS / 2) this.scale(2);
  }

  private scale(factor: number): void {
    this.now = {
      bytes: Math.min(this.most.bytes, Math.max(this.granularity, this.now.bytes * factor)),
      ranges: Math.min(this.most.ranges, Math.max(1, Math.floor(this.now.ranges * factor))),
    };
  }

  /** Bounds of the next chunk, at most `speed` bytes and `iops` requests a second in mind. */
  bounds(speed: number, iops: number): ChunkBounds {
    const bytes = Math.min(this.now.bytes, speed * LIMITED_SECONDS);
    const ranges = Math.min(this.now.ranges, iops * LIMITED_SECONDS);
    return {
      bytes: Math.max(this.granularity, roundDown(Math.floor(bytes), this.granularity)),
      ranges: Math.max(1, Math.floor(ranges)),
    };
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
