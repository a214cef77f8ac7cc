import { BELOW, COMPRESSED, guestSide, hostSide, mappedNames, PAST_MAPPED, type GuestSide } from './mapped.js';
import type { ByteRange, Preallocation } from './types.js';

/** Storage behind a byte range. The order is that of `HostState` in native/extents.h. */
export const HOST_STATES = ['hole', 'unwritten', 'written', 'shared', 'unknown'] as const;
/** `compressed`: packed among others in the file, in whose blocks it lies. */
export type HostState = (typeof HOST_STATES)[number] | 'compressed';

export const HOLE = 0;
export const UNWRITTEN = 1;
export const WRITTEN = 2;
export const SHARED = 3;
export const UNKNOWN = 4;

/** What an image in a format maps, where the host's side of it can't be seen from here. */
export const BACKED_DATA = 5;
export const BACKED_ZERO = 6;
export const ABSENT = 7;
export const OWN_ZERO = 8;
export const OWN_DATA = 9;
/** No layer has it, and there is no backing file that could ever have. */
export const UNALLOCATED = 10;
/** Mapped to storage that reads as zeros: a hole of the file, for one. */
export const OWN_ZEROED = 11;
export const BACKED_ZEROED = 12;

/** Of an NBD export, what its server calls no hole: whether it was written is not told. */
export const SERVED_DATA = PAST_MAPPED;
export const SERVED_ZEROED = PAST_MAPPED + 1;

/** All states, for people. From FIRST_MAPPED to PAST_MAPPED, both sides are known (mapped.ts). */
export const STATE_NAMES: readonly string[] = [
  ...HOST_STATES,
  'backing data',
  'backing zeros',
  'absent',
  'zeros',
  'data',
  'unallocated',
  'zeroed data',
  'backing zeroed data',
  ...mappedNames(HOST_STATES),
  'served data',
  'served zeros',
];

/** Read as zeros, by state. */
const ZERO = new Set([
  ...[HOLE, UNWRITTEN, BACKED_ZERO, ABSENT, OWN_ZERO, UNALLOCATED],
  ...[OWN_ZEROED, BACKED_ZEROED, SERVED_ZEROED],
]);
/** Read from storage, although that reads as zeros. */
const ZEROED = new Set([OWN_ZEROED, BACKED_ZEROED, SERVED_ZEROED]);
/** What depends on no other file, whatever the host has behind it. */
const ALONE = new Set([OWN_ZERO, OWN_DATA, OWN_ZEROED, UNALLOCATED]);

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
  /** Where it lies in the file, in bytes; absent where it has no place there, or none is known. */
  at?: number;
}

/** Consecutive extents as typed arrays: entry i of each belongs together. */
export interface ExtentPage {
  offset: Float64Array;
  length: Float64Array;
  /** Index into {@link STATE_NAMES}. */
  state: Uint8Array;
  /** FIEMAP_EXTENT_* flags. */
  flags: Uint32Array;
  /** The layer that has the content: 0 is the image itself. Absent: all are 0. */
  depth?: Uint32Array;
  /** Where each lies in the file, in bytes; -1 for nowhere. Absent: not known, or at its offset. */
  host?: Float64Array;
}

export function extentOf(
  offset: number,
  length: number,
  state: number,
  flags: number,
  depth = 0,
): Extent {
  const guest = guestSide(state);
  if (guest) {
    const { present, zero, data } = guest;
    const host = hostName(state);
    return { offset, length, depth: state === BELOW ? 1 : 0, present, zero, data, host, flags };
  }
  const zero = ZERO.has(state);
  return {
    offset,
    length,
    depth,
    present: state !== ABSENT && state !== UNALLOCATED,
    zero,
    data: !zero || ZEROED.has(state),
    host: HOST_STATES[state] ?? 'unknown',
    flags,
  };
}

function hostName(state: number): HostState {
  if (state === COMPRESSED) return 'compressed';
  if (state === BELOW) return 'unknown';
  return HOST_STATES[hostOf(state) ?? HOLE]!;
}

/** The host's side of a state, HOLE to UNKNOWN; null where there is none to be seen. */
export function hostOf(state: number): number | null {
  return state <= UNKNOWN ? state : hostSide(state);
}

/** Whether storage of this state is what the level asks for. */
export function meetsLevel(state: number, level: Preallocation): boolean {
  const guest = guestSide(state);
  if (guest) return mappedMeets(guest, state, level);
  if (state === WRITTEN || state === SERVED_DATA || state === SERVED_ZEROED) return true;
  return level !== 'full' && (state === UNWRITTEN || ALONE.has(state));
}

function mappedMeets({ mapped, marked }: GuestSide, state: number, level: Preallocation): boolean {
  if (!mapped) return false;
  if (level === 'metadata' || state === COMPRESSED) return true;
  if (marked) return false;
  const host = hostSide(state);
  return host === WRITTEN || (host === UNWRITTEN && level === 'falloc');
}

/** Why a state does not meet a level, for people. */
export function whyMissing(state: number, flags: number): string {
  const guest = guestSide(state);
  if (guest && !guest.mapped) return guest.why;
  if (guest?.marked && [UNWRITTEN, WRITTEN].includes(hostSide(state)!)) return guest.why;
  switch (hostSide(state) ?? state) {
    case HOLE:
      return guest ? 'hole: mapped, with no host blocks behind it' : 'hole: no host blocks';
    case UNWRITTEN:
      return 'unwritten: host blocks are reserved but not written';
    case SHARED:
      return 'shared: a write needs new host blocks, another file uses these too';
    case BACKED_DATA:
    case BACKED_ZEROED:
      return 'backing: the content comes from a backing file';
    case BACKED_ZERO:
      return 'backing: a backing file says that it is zeros';
    case ABSENT:
      return 'absent: no layer has it';
    case UNALLOCATED:
      return 'unallocated: the image maps nothing there';
    case OWN_ZERO:
      return 'zeros: the image says so, without host blocks';
    case OWN_DATA:
    case OWN_ZEROED:
      return 'data: what is behind it on the host is not known';
    default:
      return flags & EXTENT_FLAGS.delalloc
        ? 'unknown: written but not yet given host blocks'
        : 'unknown: the storage does not tell';
  }
}
