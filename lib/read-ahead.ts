/** Pages of extents, several of them read at a time. Knows nothing of where they are read from. */
import type { ExtentPage } from './extent.js';
import { endOf } from './range.js';
import type { ByteRange } from './types.js';

/** `next` is where the following page starts: the end of what was asked for, unless it was full. */
export type ReadPage = ExtentPage & { next: number };

/** Reads from `offset` on, to `end` or until the page is full; nothing at all if cancelled. */
export type Reader = (offset: number, end: number) => Promise<ReadPage>;

interface Piece {
  offset: number;
  end: number;
  /** Once it is asked for. */
  page?: Promise<ReadPage>;
}

const LEAST_SPAN = 2 ** 20;

/** As many as the addon has threads. On two processors six or eight took 10 MiB more, no less time. */
export const PAGES_AHEAD = 4;

/**
 * Pages of `range` in order, while up to `ahead` pieces of it are asked for: the kernel reads
 * extents of one file on several processors at once. How many bytes make a page is learnt from the
 * pages before. The borders of pieces do not show: an extent that lies across one comes whole.
 */
export async function* readAhead(
  range: ByteRange,
  ahead: number,
  read: Reader,
): AsyncGenerator<ExtentPage, void, undefined> {
  let held: ExtentPage | undefined;
  for await (const page of piecewise(range, ahead, read)) {
    if (held) {
      held = withoutContinued(held, page);
      if (held.state.length > 0) yield held;
    }
    held = page;
  }
  if (held) yield held;
}

async function* piecewise(range: ByteRange, ahead: number, read: Reader) {
  if (range.length === 0) return;
  const end = endOf(range);
  const first = await read(range.offset, end);
  if (first.state.length === 0) return;
  yield first;
  const pieces = new Pieces(first, range.offset, end, read);
  while (!pieces.done) {
    pieces.fill(ahead);
    const page = await pieces.take();
    if (page.state.length === 0) return;
    yield page;
  }
}

/** Pieces that bring fewer extents than this can be larger. */
const SPARSE = 2048;

class Pieces {
  /** In order and without gaps; what lies behind those being read is one piece. */
  private readonly queue: Piece[] = [];
  private span: number;

  constructor(
    first: ReadPage,
    start: number,
    end: number,
    private readonly read: Reader,
  ) {
    this.span = spanOf(first, start);
    if (first.next < end) this.queue.push({ offset: first.next, end });
  }

  get done(): boolean {
    return this.queue.length === 0;
  }

  fill(ahead: number): void {
    for (let i = 0; i < Math.min(ahead, this.queue.length); i++) {
      const piece = this.queue[i]!;
      if (piece.page) continue;
      const rest = { offset: piece.offset + this.span, end: piece.end };
      if (rest.offset < rest.end) {
        this.queue.splice(i + 1, 0, rest);
        piece.end = rest.offset;
      }
      piece.page = this.read(piece.offset, piece.end);
      // Awaited in its turn, unless the caller leaves the loop before.
      piece.page.catch(() => undefined);
    }
  }

  /** The next page in order; what it leaves of a piece that was denser than thought is the next. */
  async take(): Promise<ReadPage> {
    const { offset, end, page: reading } = this.queue.shift()!;
    const page = await reading!;
    if (page.next < end && page.state.length > 0) {
      this.queue.unshift({ offset: page.next, end });
      this.span = spanOf(page, offset);
    } else if (page.state.length < SPARSE && end - offset >= this.span) {
      this.span *= 2;
    }
    return page;
  }
}

/** Bytes that fill a page where extents lie as in this one: a little less, so that few overflow. */
function spanOf(page: ReadPage, start: number): number {
  return Math.max(LEAST_SPAN, Math.floor((page.next - start) * 0.9));
}

/** Gives the last extent of `page` to `following`, where that continues it. */
function withoutContinued(page: ExtentPage, following: ExtentPage): ExtentPage {
  const last = page.state.length - 1;
  if (!continues(page, last, following)) return page;
  following.offset[0] = page.offset[last]!;
  following.length[0]! += page.length[last]!;
  if (page.host && following.host) following.host[0] = page.host[last]!;
  return {
    offset: page.offset.subarray(0, last),
    length: page.length.subarray(0, last),
    state: page.state.subarray(0, last),
    flags: page.flags.subarray(0, last),
    ...(page.host && { host: page.host.subarray(0, last) }),
  };
}

function continues(page: ExtentPage, last: number, following: ExtentPage): boolean {
  if (page.state[last] !== following.state[0] || page.flags[last] !== following.flags[0]) return false;
  if (!page.host || !following.host) return true;
  const at = page.host[last]!;
  return following.host[0] === (at < 0 ? at : at + page.length[last]!);
}
