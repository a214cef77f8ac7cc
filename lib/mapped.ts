/**
 * What an image in a format that thicken reads itself says of a range, and what the host has behind
 * it: a table of guest × host. The order is that of `JoinedState` in native/qcow2/host.h.
 */

/** What the guest's side is, in `qemu-img map`'s words, and for people. */
export interface GuestSide {
  name: string;
  present: boolean;
  zero: boolean;
  data: boolean;
  /** Whether the image maps it, so that its content depends on nothing else. */
  mapped: boolean;
  /** Whether a later write needs another cluster for it: compressed, or a snapshot has it too. */
  moves: boolean;
  /**
   * Whether it has storage, but is marked as zeros: a write to a part of it has QEMU zero the rest by
   * fallocate(2), for which the file system may want new blocks.
   */
  marked: boolean;
  /** Why it is missing, where the image does not map it, or marks it. */
  why: string;
}

const MAPPED = { present: true, zero: false, data: true, mapped: true, moves: false, marked: false, why: '' };
const ZEROS = { ...MAPPED, zero: true, data: false };
const MARKED = {
  ...ZEROS,
  marked: true,
  why: 'zeros: the image says so of a cluster that it has, and a write to a part may need new host blocks',
};
const NOTHING = { ...ZEROS, present: false, mapped: false };

/** Without a place on the host. */
const ALONE: GuestSide[] = [
  {
    ...{ ...NOTHING, zero: false, name: 'backing file' },
    why: 'backing: the content comes from a backing file',
  },
  { ...NOTHING, name: 'unmapped', why: 'unmapped: the image has no cluster for it' },
  {
    ...{ ...ZEROS, mapped: false, name: 'plain zeros' },
    why: 'zeros: the image says so, and has no cluster for it',
  },
  { ...MAPPED, moves: true, name: 'compressed' },
];
/** With one, and so with each of the host's states. */
const PLACED: GuestSide[] = [
  { ...MAPPED, name: 'data' },
  { ...MARKED, name: 'zeros' },
  { ...NOTHING, name: 'part', why: 'part: the image maps its cluster, but not this part of it' },
  { ...MAPPED, moves: true, name: 'snapshot data' },
  { ...MARKED, moves: true, name: 'snapshot zeros' },
  // Of encrypted images, or beside data in a cluster that a snapshot has too.
  { ...ZEROS, name: 'kept zeros' },
  { ...ZEROS, moves: true, name: 'snapshot kept zeros' },
];

/** States of extents begin here that both sides are known of. */
export const FIRST_MAPPED = 13;
const FIRST_PLACED = FIRST_MAPPED + ALONE.length;
/** And end here. */
export const PAST_MAPPED = FIRST_PLACED + PLACED.length * 5;

export const BELOW = FIRST_MAPPED;
export const UNMAPPED = FIRST_MAPPED + 1;
export const PLAIN_ZEROS = FIRST_MAPPED + 2;
export const COMPRESSED = FIRST_MAPPED + 3;

/** The guest's side of a state; null where it is none of these. */
export function guestSide(state: number): GuestSide | null {
  if (state < FIRST_MAPPED) return null;
  return ALONE[state - FIRST_MAPPED] ?? PLACED[Math.floor((state - FIRST_PLACED) / 5)] ?? null;
}

/** The host's side, as its index in HOST_STATES; null where there is no place, or none is known. */
export function hostSide(state: number): number | null {
  return state < FIRST_PLACED || state >= PAST_MAPPED ? null : (state - FIRST_PLACED) % 5;
}

/** For people. */
export function mappedNames(hostNames: readonly string[]): string[] {
  const placed = PLACED.flatMap(({ name }) => hostNames.map((host) => `${name}, ${host}`));
  return [...ALONE.map(({ name }) => name), ...placed];
}
