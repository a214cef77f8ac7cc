import type { ByteRange } from './types.js';

/**
 * Ranges in ascending order, in bounded memory: when there are more than `most`, neighbours with
 * the smallest gaps between them are merged, so that the list always covers what was added.
 */
export class RangeList {
  /** Flat, since there may be many: an object for each would be the garbage collector's work. */
  private starts: number[] = [];
  private ends: number[] = [];
  /** Ranges closer than this are merged (bytes); 0: only those that touch. */
  private gap = 0;
  /** Bytes added. */
  bytes = 0;

  constructor(private readonly most: number) {}

  /** Whether the list covers no more than what was added. */
  get exact(): boolean {
    return this.gap === 0;
  }

  /** `offset` must not lie before the end of what was added last. */
  add(offset: number, length: number): void {
    this.bytes += length;
    this.append(offset, offset + length);
    if (this.starts.length > this.most) this.coarsen();
  }

  list(): ByteRange[] {
    return this.starts.map((offset, i) => ({ offset, length: this.ends[i]! - offset }));
  }

  /** Offset, length, offset, length, …; null where that would cover more than what was added. */
  flat(): Float64Array | null {
    if (!this.exact) return null;
    const flat = new Float64Array(this.starts.length * 2);
    this.starts.forEach((start, i) => {
      flat[2 * i] = start;
      flat[2 * i + 1] = this.ends[i]! - start;
    });
    return flat;
  }

  /** From the first byte to the last. */
  around(): ByteRange {
    const offset = this.starts[0] ?? 0;
    return { offset, length: (this.ends[this.ends.length - 1] ?? 0) - offset };
  }

  private append(start: number, end: number): void {
    const last = this.ends.length - 1;
    if (last >= 0 && start - this.ends[last]! <= this.gap) {
      this.ends[last] = end;
    } else {
      this.starts.push(start);
      this.ends.push(end);
    }
  }

  private coarsen(): void {
    while (this.starts.length > Math.max(1, this.most / 2)) {
      this.gap = Math.max(4096, this.gap * 2);
      const { starts, ends } = this;
      this.starts = [];
      this.ends = [];
      starts.forEach((start, i) => this.append(start, ends[i]!));
    }
  }
}
