/** Where content ends and zeros begin, in whole clusters. */
import { BASE_ALLOCATION } from '../nbd/client.js';
import { STATE_ZERO } from '../nbd/protocol.js';
import { statusPages, type StatusSource } from '../nbd/status-stream.js';
import { clip, endOf, roundDown, widen } from '../range.js';
import type { ByteRange } from '../types.js';

const MIB = 2 ** 20;

/** A whole number of clusters of every format that has backing files. */
const WINDOW = 64 * MIB;
/** A smaller range may be the only one of its window that is asked for. */
const LEAST_IN_WINDOW = MIB;
/** As many as chunks in flight lie in. */
const WINDOWS_KEPT = 2;

/**
 * Cuts ranges of whole clusters where zeros begin and end; a cluster of both is none of zeros. What
 * QEMU copies by one request becomes data as a whole unless all of it reads as zeros (7.2).
 *
 * For images that nobody else writes to: what is told of a window is kept while it is copied. A look for
 * each chunk held the copies of 4 MiB up, with storage in memory.
 */
export class ZeroParts {
  /** Content by the start of its window, the latest last. */
  private readonly windows = new Map<number, Promise<ByteRange[]>>();
  /** What lies outside may not even be readable: the run must not fail for it. */
  private readonly request: ByteRange;

  constructor(
    private readonly nbd: StatusSource,
    private readonly cluster: number,
    /** All that will be asked for. */
    range: ByteRange,
  ) {
    this.request = widen(range, cluster, nbd.size);
  }

  async partsOf(range: ByteRange): Promise<ByteRange[]> {
    const parts: ByteRange[] = [];
    let done = range.offset;
    for (const data of await this.contentOf(range)) {
      if (data.offset > done) parts.push({ offset: done, length: data.offset - done });
      parts.push(data);
      done = endOf(data);
    }
    if (done < endOf(range)) parts.push({ offset: done, length: endOf(range) - done });
    return parts;
  }

  private async contentOf(range: ByteRange): Promise<ByteRange[]> {
    if (range.length < LEAST_IN_WINDOW) return this.ask(range);
    const found: ByteRange[] = [];
    for (let start = roundDown(range.offset, WINDOW); start < endOf(range); start += WINDOW) {
      for (const data of await this.windowFrom(start)) {
        const part = clip(data, range);
        if (part.length > 0) append(found, part);
      }
    }
    return found;
  }

  private windowFrom(start: number): Promise<ByteRange[]> {
    const known = this.windows.get(start);
    if (known) return known;
    const asked = this.ask(clip({ offset: start, length: WINDOW }, this.request));
    this.windows.set(start, asked);
    asked.catch(() => this.windows.delete(start));
    const [oldest] = this.windows.keys();
    if (this.windows.size > WINDOWS_KEPT) this.windows.delete(oldest!);
    return asked;
  }

  private async ask(range: ByteRange): Promise<ByteRange[]> {
    const found: ByteRange[] = [];
    const asked = { contexts: [BASE_ALLOCATION], lanes: 1 };
    for await (const { offset, length, flags } of statusPages(this.nbd, range, asked)) {
      for (let i = 0; i < length.length; i++) {
        if ((flags[0]![i]! & STATE_ZERO) !== 0) continue;
        append(found, widen({ offset: offset[i]!, length: length[i]! }, this.cluster, this.nbd.size));
      }
    }
    return found;
  }
}

/** Ranges come in order, and what touches is one. */
function append(ranges: ByteRange[], range: ByteRange): void {
  const last = ranges.at(-1);
  if (!last || range.offset > endOf(last)) ranges.push({ ...range });
  else last.length = Math.max(endOf(last), endOf(range)) - last.offset;
}
