import type { ByteRange, Preallocation } from './types.js';

/** Storage behind a byte range. The order is that of `HostState` in native/extents.h. */
export const HOST_STATES = ['hole', 'unwritten', 'written', 'shared', 'unknown'] as const;
export type HostState = (typeof HOST_STATES)[number];

export const HOLE = 0;
export const UNWRITTEN = 1;
export const WRITTEN = 2;
export const SHARED = 3;
export const UNKNOWN = 4;

/** FIEMAP_EXTENT_* flags (linux/fiemap.h) as `Extent.flags` carries them. */
export const EXTENT_FLAGS = {
  unknown: 0x2,
  delalloc: 0x4,
  encoded: 0x8,
  dataEncrypted: 0x80,
  notAligned: 0x100,
  inline: 0x200,
  tail: 0x400,
  unwritten: 0x800,
  shared: 0x2000,
} as const;

/** A byte range with one state, seen from the guest (`qemu-img map`'s words) and from the host. */
export interface Extent extends ByteRange {
  depth: number;
  present: boolean;
  zero: boolean;
  data: boolean;
  host: HostState;
  /** FIEMAP_EXTENT_* flags; 0 where another method was used. */
  flags: number;
}

/** Consecutive extents as typed arrays: entry i of each belongs together. */
export interface ExtentPage {
  offset: Float64Array;
  length: Float64Array;
  /** Index into {@link HOST_STATES}. */
  state: Uint8Array;
  /** FIEMAP_EXTENT_* flags. */
  flags: Uint32Array;
}

export function extentOf(offset: number, length: number, state: number, flags: number): Extent {
  const zero = state === HOLE || state === UNWRITTEN;
  return {
    offset,
    length,
    depth: 0,
    present: true,
    zero,
    data: !zero,
    host: HOST_STATES[state] ?? 'unknown',
    flags,
  };
}

/** Whether storage of this state is what the level asks for. */
export function meetsLevel(state: number, level: Preallocation): boolean {
  return state === WRITTEN || (state === UNWRITTEN && level !== 'full');
}

/** Why a state does not meet a level, for people. */
export function whyMissing(state: number, flags: number): string {
  switch (state) {
    case HOLE:
      return 'hole: no host blocks';
    case UNWRITTEN:
      return 'unwritten: host blocks are reserved but not written';
    case SHARED:
      return 'shared: a write needs new host blocks, another file uses these too';
    default:
      return flags & EXTENT_FLAGS.delalloc
        ? 'unknown: written but not yet given host blocks'
        : 'unknown: the storage does not tell';
  }
}
