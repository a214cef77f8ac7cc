/** Of a chunk. */
export interface Most {
  bytes: number;
  /** Number of ranges. */
  ranges: number;
}

/**
 * Ranges (offset, length, …) that wait for their turn, first in, first out. Flat, and moved as
 * blocks of memory: a scattered disk has more of them than an interpreted loop gets through quickly.
 */
export class RangeQueue {
  /** The queue's own: a range that is begun is cut in place. */
  private waiting = new Float64Array(0);
  private total = 0;

  /** All that wait. */
  get bytes(): number {
    return this.total;
  }

  /** Whether those that wait make a whole chunk. */
  fills({ bytes, ranges }: Most): boolean {
    return this.total >= bytes || this.waiting.length >= 2 * ranges;
  }

  add(ranges: Float64Array): void {
    this.waiting = joined(this.waiting, ranges);
    this.total += bytesOf(ranges);
  }

  /** What was taken last comes first again. */
  putBack(ranges: Float64Array): void {
    this.waiting = joined(ranges, this.waiting);
    this.total += bytesOf(ranges);
  }

  /** At most so much. */
  take({ bytes, ranges }: Most): Float64Array {
    const { waiting } = this;
    const most = Math.min(waiting.length, 2 * ranges);
    let end = 0;
    let left = bytes;
    for (; end < most && waiting[end + 1]! <= left; end += 2) left -= waiting[end + 1]!;
    const begun = end < most && left > 0;
    const taken = waiting.slice(0, begun ? end + 2 : end);
    this.waiting = waiting.subarray(end);
    if (begun) {
      taken[end + 1] = left;
      this.waiting[0]! += left;
      this.waiting[1]! -= left;
    }
    this.total -= bytesOf(taken);
    return taken;
  }
}

/** Of ranges as offset, length, …. */
export function bytesOf(ranges: Float64Array): number {
  let bytes = 0;
  for (let i = 1; i < ranges.length; i += 2) bytes += ranges[i]!;
  return bytes;
}

function joined(first: Float64Array, second: Float64Array): Float64Array<ArrayBuffer> {
  const both = new Float64Array(first.length + second.length);
  both.set(first);
  both.set(second, first.length);
  return both;
}
