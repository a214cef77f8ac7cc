/** Block status of a whole range, with several requests under way. */
import { endOf, roundDown, widen } from '../range.js';
import type { ByteRange } from '../types.js';
import type { NbdClient } from './client.js';
import { nbdErrors } from './errors.js';
import { clipPage, joinContexts, withoutContinued, type StatusPage } from './status-join.js';

export type { StatusPage } from './status-join.js';

export type StatusSource = Pick<
  NbdClient,
  'blockStatus' | 'contexts' | 'blockSize' | 'size' | 'path'
>;

export interface StatusStreamOptions {
  /** Of the client's contexts, and the order of `flags`; all by default. */
  contexts?: readonly string[];
  /** Requests under way at a time; 4 by default. */
  lanes?: number;
  /**
   * Bytes that one request asks for at most, under 4 GiB; 2 GiB by default. QEMU looks up the extents
   * of one request in the thread of a guest's I/O: ask for less where a guest runs.
   */
  step?: number;
  signal?: AbortSignal | undefined;
}

const DEFAULT_STEP = 2 ** 31;
const LEAST_SPAN = 2 ** 20;

/**
 * Pages of extents of `range` (within the export; it need not be in whole blocks), in order and
 * without gaps. Neighbours that tell the same are one extent, also across pages. Memory is bounded
 * by the `lanes` answers that are held. Throws what `blockStatus` does, and ENOTSUP where a context
 * was not negotiated.
 */
export async function* statusPages(
  client: StatusSource,
  range: ByteRange,
  options: StatusStreamOptions = {},
): AsyncGenerator<StatusPage, void, undefined> {
  let held: StatusPage | undefined;
  for await (const page of rawPages(client, range, options)) {
    if (held) {
      held = withoutContinued(held, page);
      if (held.length.length > 0) yield clipPage(held, range.offset, endOf(range));
    }
    held = page;
  }
  if (held) yield clipPage(held, range.offset, endOf(range));
}

/** The same, as extents are read: cancelled by `signal`, the pages end, and whoever cancelled knows. */
export async function* pagesUntil(
  signal: AbortSignal | undefined,
  client: StatusSource,
  range: ByteRange,
  options: Omit<StatusStreamOptions, 'signal'>,
): AsyncGenerator<StatusPage, void, undefined> {
  try {
    yield* statusPages(client, range, { ...options, signal });
  } catch (error) {
    if (!signal?.aborted) throw error;
  }
}

async function* rawPages(client: StatusSource, range: ByteRange, options: StatusStreamOptions) {
  if (range.length === 0) return;
  const leaving = new AbortController();
  const leave = () => leaving.abort();
  const { signal } = options;
  if (signal?.aborted) leave();
  signal?.addEventListener('abort', leave);
  try {
    const pieces = new Pieces(client, range, options, leaving.signal);
    while (!pieces.done) yield await pieces.take();
  } finally {
    signal?.removeEventListener('abort', leave);
    // Whoever leaves the loop early has no use for what is still under way.
    leave();
  }
}

interface Piece {
  end: number;
  page: Promise<StatusPage & { covered: number }>;
}

class Pieces {
  private readonly queue: Piece[] = [];
  private readonly picks: number[];
  private readonly lanes: number;
  private readonly step: number;
  private readonly unit: number;
  private readonly end: number;
  private next: number;
  /** Bytes asked for at a time: about what the last answers covered. */
  private span: number;

  constructor(
    private readonly client: StatusSource,
    range: ByteRange,
    options: StatusStreamOptions,
    private readonly signal: AbortSignal,
  ) {
    this.unit = client.blockSize.minimum;
    this.picks = picksOf(client, options.contexts ?? client.contexts);
    this.lanes = Math.max(1, options.lanes ?? 4);
    const step = Math.min(options.step ?? DEFAULT_STEP, 2 ** 32 - this.unit);
    this.step = Math.max(this.unit, roundDown(step, this.unit));
    this.span = this.step;
    const whole = widen(range, this.unit, client.size);
    this.next = whole.offset;
    this.end = endOf(whole);
  }

  get done(): boolean {
    return this.queue.length === 0 && this.next >= this.end;
  }

  async take(): Promise<StatusPage> {
    this.fill();
    const piece = this.queue[0]!;
    const { covered, ...page } = await piece.page;
    const reached = page.offset[0]! + covered;
    if (reached < piece.end) {
      piece.page = this.ask(reached, piece.end);
      this.setSpan(Math.max(LEAST_SPAN, covered));
    } else {
      this.queue.shift();
      this.setSpan(this.span * 2);
    }
    return page;
  }

  private fill(): void {
    while (this.queue.length < this.lanes && this.next < this.end) {
      const end = Math.min(this.end, this.next + this.span);
      this.queue.push({ end, page: this.ask(this.next, end) });
      this.next = end;
    }
  }

  private setSpan(bytes: number): void {
    this.span = Math.max(this.unit, roundDown(Math.min(this.step, bytes), this.unit));
  }

  private ask(offset: number, end: number): Piece['page'] {
    const { signal, picks } = this;
    const page = this.client
      .blockStatus(offset, end - offset, { signal })
      .then((contexts) => joinContexts(picks.map((i) => contexts[i]!), offset));
    // Awaited in its turn, unless the caller leaves the loop before.
    page.catch(() => undefined);
    return page;
  }
}

/** Places of the contexts in an answer. */
function picksOf(client: StatusSource, names: readonly string[]): number[] {
  return names.map((name) => {
    const index = client.contexts.indexOf(name);
    if (index < 0) throw nbdErrors.notOffered(client.path, `the meta context ${name}`);
    return index;
  });
}
