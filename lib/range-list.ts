import type { ByteRange } from './types.js';

/**
 * Ranges in ascending order, in bounded memory: when there are more than `most`, neighbours with
 * the smallest gaps between them are merged, so that the list always covers what was added.
 */
export class RangeList {
  private ranges: ByteRange[] = [];
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
    this.append(offset, length);
    if (this.ranges.length > this.most) this.coarsen();
  }

  list(): readonly ByteRange[] {
    return this.ranges;
  }

  private append(offset: number, length: number): void {
    const last = this.ranges[this.ranges.length - 1];
    if (last && offset - (last.offset + last.length) <= this.gap) {
      last.length = offset + length - last.offset;
    } else {
      this.ranges.push({ offset, length });
    }
  }

  private coarsen(): void {
    while (this.ranges.length > Math.max(1, this.most / 2)) {
      this.gap = Math.max(4096, this.gap * 2);
      const before = this.ranges;
      this.ranges = [];
      for (const { offset, length } of before) this.append(offset, length);
    }
  }
}
