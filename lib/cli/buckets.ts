import {
  BACKED_DATA,
  HOLE,
  hostOf,
  OWN_ZERO,
  SHARED,
  STATE_NAMES,
  UNALLOCATED,
  type ExtentPage,
} from '../extent.js';
import { BELOW, COMPRESSED, FIRST_MAPPED, guestSide, PLAIN_ZEROS } from '../mapped.js';
import type { ByteRange } from '../types.js';

/** A range cut into equal columns, with the bytes of each state in each: what a picture needs. */
export class Buckets {
  /** Bytes by column and state: index `column * STATE_NAMES.length + state`. */
  private readonly bytes: Float64Array;
  readonly totals = new Float64Array(STATE_NAMES.length);

  constructor(
    readonly range: ByteRange,
    readonly columns: number,
  ) {
    this.bytes = new Float64Array(columns * STATE_NAMES.length);
  }

  addPage(page: ExtentPage): void {
    for (let i = 0; i < page.state.length; i++) {
      this.add(page.offset[i]! - this.range.offset, page.length[i]!, picturedAs(page.state[i]!));
    }
  }

  /** Bytes that a column stands for. */
  get width(): number {
    return this.range.length / this.columns;
  }

  private add(offset: number, length: number, state: number): void {
    this.totals[state]! += length;
    const { width } = this;
    const last = Math.min(this.columns - 1, Math.floor((offset + length) / width));
    for (let column = Math.min(last, Math.floor(offset / width)); column <= last; column++) {
      const from = Math.max(offset, column * width);
      const to = column === last ? offset + length : Math.min(offset + length, (column + 1) * width);
      this.bytes[column * STATE_NAMES.length + state]! += Math.max(0, to - from);
    }
  }

  /** The share of a column that has a state, from 0 to 1. */
  share(column: number, state: number): number {
    return this.width === 0
      ? 0
      : Math.min(1, this.bytes[column * STATE_NAMES.length + state]! / this.width);
  }
}

/**
 * What a state of both sides looks like: the host's, where the image maps it to that. What a later write
 * must move looks shared.
 */
function picturedAs(state: number): number {
  if (state < FIRST_MAPPED) return state;
  const host = hostOf(state);
  const guest = guestSide(state)!;
  if (host !== null && guest.mapped) return guest.moves && host !== HOLE ? SHARED : host;
  if (state === COMPRESSED) return SHARED;
  if (state === BELOW) return BACKED_DATA;
  return state === PLAIN_ZEROS ? OWN_ZERO : UNALLOCATED;
}
