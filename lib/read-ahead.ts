/** Pages of extents, several of them read at a time. Knows nothing of where they are read from. */
import type { ExtentPage } from './extent.js';
import { endOf } from './range.js';
import type { ByteRange } from './types.js';

/** `next` is where the following page starts: the end of what was asked for, unless it was full. */
export type ReadPage = ExtentPage & { next: number };

/** Reads from `offset` on, to `end` or until the page is full; nothing at all if cancelled. */
export type Reader = (offset: number, end: number) => Promise<ReadPage>;

interface Piece {
  end: number;
  page: Promise<ReadPage>;
}

const LEAST_SPAN = 2 ** 20;

/**
 * Pages of `range` in order, while up to `lanes` pieces of it are being read: the kernel reads
 * extents of one file on several processors at once. How many bytes make a page is learnt from the
 * pages before. The borders of pieces do not show: an extent that lies across one comes whole.
 */
export async function* readAhead(
  range: ByteRange,
  lanes: number,
  read: Reader,
): AsyncGenerator<ExtentPage, void, undefined> {
  let held: ExtentPage | undefined;
  for await (const page of piecewise(range, lanes, read)) {
    if (held) {
      held = withoutContinued(held, page);
      if (held.state.length > 0) yield held;
    }
    held = page;
  }
  if (held) yield held;
}

async function* piecewise(range: ByteRange, lanes: number, read: Reader) {
  if (range.length === 0) return;
  const end = endOf(range);
  const first = await read(range.offset, end);
  if (first.state.length === 0) return;
  yield first;
  const pieces = new Pieces(first.next, end, first.next - range.offset, read);
  while (!pieces.done) {
    pieces.fill(lanes);
    const page = await pieces.take();
    if (page.state.length === 0) return;
    yield page;
  }
}

class Pieces {
  private readonly queue: Piece[] = [];
  private span: number;

  constructor(
    private next: number,
    private readonly end: number,
    firstSpan: number,
    private readonly read: Reader,
  ) {
    // A little less than a page, so that pieces seldom overflow one.
    this.span = Math.max(LEAST_SPAN, Math.floor(firstSpan * 0.9));
  }

  get done(): boolean {
    return this.queue.length === 0 && this.next >= this.end;
  }

  fill(lanes: number): void {
    while (this.queue.length < lanes && this.next < this.end) {
      const end = Math.min(this.end, this.next + this.span);
      this.queue.push({ end, page: this.start(this.next, end) });
      this.next = end;
    }
  }

  /** The next page in order; its piece goes on being read where it was denser than thought. */
  async take(): Promise<ReadPage> {
    const piece = this.queue[0]!;
    const page = await piece.page;
    if (page.next < piece.end && page.state.length > 0) {
      piece.page = this.start(page.next, piece.end);
      this.span = Math.max(LEAST_SPAN, Math.floor(this.span * 0.75));
    } else {
      this.queue.shift();
      if (page.state.length < SPARSE) this.span *= 2;
    }
    return page;
  }

  private start(offset: number, end: number): Promise<ReadPage> {
    const page = this.read(offset, end);
    // Awaited in its turn, unless the caller leaves the loop before.
    page.catch(() => undefined);
    return page;
  }
}

/** Pieces that bring fewer extents than this can be larger. */
const SPARSE = 2048;

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
