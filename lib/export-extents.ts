/** Extents of an export as its NBD server tells them, by the protocol's own `base:allocation`. */
import { HOLE, SERVED_DATA, SERVED_ZEROED, UNKNOWN, type ExtentPage } from './extent.js';
import { ToldExtents, UnknownExtents } from './extent-source.js';
import type { CancelFlag } from './native.js';
import { BASE_ALLOCATION, type NbdClient } from './nbd/client.js';
import { STATE_HOLE, STATE_ZERO } from './nbd/protocol.js';
import { pagesUntil, type StatusPage } from './nbd/status-stream.js';
import type { ByteRange } from './types.js';

export class ExportExtents extends ToldExtents {
  /** Whether the server has a map at all. */
  readonly mapped: boolean;
  /** Bytes that the map called holes when it was last read; null: it was not read yet. */
  holes: number | null = null;
  /** Whether it ever told of more than data: who can't tell calls all allocated (NBD protocol). */
  tells = false;

  constructor(private readonly nbd: NbdClient) {
    super();
    this.mapped = nbd.contexts.includes(BASE_ALLOCATION);
  }

  async *pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined> {
    if (!this.mapped) return yield* new UnknownExtents().pages(range);
    this.holes = 0;
    const pages = pagesUntil(cancel?.signal, this.nbd, range, { contexts: [BASE_ALLOCATION] });
    for await (const status of pages) {
      const page = servedExtents(status);
      this.note(page);
      yield page;
    }
  }

  private note({ length, state }: ExtentPage): void {
    let holes = 0;
    for (let i = 0; i < state.length; i++) {
      if (isHole(state[i]!)) holes += length[i]!;
      if (state[i] !== SERVED_DATA) this.tells = true;
    }
    this.holes = (this.holes ?? 0) + holes;
  }
}

function isHole(state: number): boolean {
  return state === HOLE || state === UNKNOWN;
}

export function servedExtents({ offset, length, flags }: StatusPage): ExtentPage {
  return { offset, length, state: Uint8Array.from(flags[0]!, stateOf), flags: new Uint32Array(length.length) };
}

/** A hole need not read as zeros: what it holds is then for the read before the write to say. */
function stateOf(flags: number): number {
  const zero = (flags & STATE_ZERO) !== 0;
  if ((flags & STATE_HOLE) !== 0) return zero ? HOLE : UNKNOWN;
  return zero ? SERVED_ZEROED : SERVED_DATA;
}
