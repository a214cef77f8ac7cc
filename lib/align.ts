/** Extents in whole units, for storage that can be asked for nothing smaller. Pure. */
import { HOLE, SHARED, UNKNOWN, UNWRITTEN, WRITTEN, type ExtentPage } from './extent.js';
import { clip, endOf, roundDown, roundUp } from './range.js';
import type { ByteRange } from './types.js';

/** From the least allocated to the most: what has to be done for a part is done for its unit. */
const RANKED = [HOLE, UNWRITTEN, UNKNOWN, SHARED, WRITTEN];

interface Piece {
  offset: number;
  length: number;
  state: number;
  flags: number;
}

/**
 * `pages` again, with boundaries on multiples of `unit` only: a unit of several states takes the
 * least allocated. The pages cover `range` widened to whole units, as far as there is storage; what
 * comes back is clipped to `range`.
 */
export async function* alignPages(
  pages: AsyncIterable<ExtentPage>,
  unit: number,
  range: ByteRange,
): AsyncGenerator<ExtentPage, void, undefined> {
  const aligner = new Aligner(unit, range);
  for await (const page of pages) {
    for (let i = 0; i < page.state.length; i++) {
      aligner.add(page.offset[i]!, page.length[i]!, page.state[i]!, page.flags[i]!);
    }
    const settled = aligner.take();
    if (settled) yield settled;
  }
  const rest = aligner.finish();
  if (rest) yield rest;
}

class Aligner {
  /** The last one may go on with what comes next. */
  private pieces: Piece[] = [];
  /** The unit that has begun and not ended yet. */
  private open: Piece | undefined;

  constructor(
    private readonly unit: number,
    private readonly range: ByteRange,
  ) {}

  add(offset: number, length: number, state: number, flags: number): void {
    const end = offset + length;
    const whole = Math.min(end, roundUp(offset, this.unit));
    if (whole > offset) this.mix({ offset, length: whole - offset, state, flags });
    const rest = Math.max(whole, roundDown(end, this.unit));
    if (rest > whole) this.emit({ offset: whole, length: rest - whole, state, flags });
    if (end > rest) this.mix({ offset: rest, length: end - rest, state, flags });
  }

  /** What nothing can be added to any more. */
  take(): ExtentPage | null {
    return pageOf(this.pieces.splice(0, this.pieces.length - 1));
  }

  finish(): ExtentPage | null {
    this.close();
    return pageOf(this.pieces.splice(0));
  }

  /** Adds a part of one unit. */
  private mix(part: Piece): void {
    const { open } = this;
    if (open) {
      open.length += part.length;
      if (RANKED.indexOf(part.state) < RANKED.indexOf(open.state)) {
        Object.assign(open, { state: part.state, flags: part.flags });
      }
    } else {
      this.open = part;
    }
    if (endOf(part) % this.unit === 0) this.close();
  }

  private close(): void {
    if (this.open) this.emit(this.open);
    this.open = undefined;
  }

  private emit(piece: Piece): void {
    const { offset, length } = clip(piece, this.range);
    if (length === 0) return;
    const last = this.pieces.at(-1);
    if (last && last.state === piece.state && last.flags === piece.flags) last.length += length;
    else this.pieces.push({ ...piece, offset, length });
  }
}

function pageOf(pieces: Piece[]): ExtentPage | null {
  if (pieces.length === 0) return null;
  return {
    offset: Float64Array.from(pieces, (piece) => piece.offset),
    length: Float64Array.from(pieces, (piece) => piece.length),
    state: Uint8Array.from(pieces, (piece) => piece.state),
    flags: Uint32Array.from(pieces, (piece) => piece.flags),
  };
}
