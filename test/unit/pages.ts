import type { ExtentPage } from '../../lib/extent.js';

export interface Piece {
  offset: number;
  length: number;
  state: number;
  flags?: number;
}

export function pageOf(pieces: readonly Piece[]): ExtentPage {
  return {
    offset: Float64Array.from(pieces, (piece) => piece.offset),
    length: Float64Array.from(pieces, (piece) => piece.length),
    state: Uint8Array.from(pieces, (piece) => piece.state),
    flags: Uint32Array.from(pieces, (piece) => piece.flags ?? 0),
  };
}
