/** Extents of several meta contexts as one list. Pure. */
import type { ContextStatus } from './replies.js';

/** Consecutive extents: entry i of each array belongs together. */
export interface StatusPage {
  /** Bytes. */
  offset: Float64Array;
  length: Float64Array;
  /** For each context, in the order asked for, its number for each extent. */
  flags: Uint32Array[];
}

/**
 * Extents from `offset` on, as far as all contexts tell (`covered` bytes): each has one number of
 * every context, and neighbours differ in at least one.
 */
export function joinContexts(
  parts: readonly ContextStatus[],
  offset: number,
): StatusPage & { covered: number } {
  const covered = Math.min(...parts.map((part) => part.length));
  const most = parts.reduce((sum, part) => sum + part.lengths.length, 0);
  const page = emptyPage(most, parts.length);
  const cursors = parts.map((part) => new Cursor(part));
  let count = 0;
  for (let at = 0; at < covered; ) {
    let end = covered;
    for (const cursor of cursors) end = Math.min(end, cursor.end);
    if (count === 0 || differs(page.flags, count - 1, cursors)) {
      page.offset[count] = offset + at;
      cursors.forEach((cursor, i) => (page.flags[i]![count] = cursor.flag));
      count++;
    }
    page.length[count - 1]! += end - at;
    at = end;
    for (const cursor of cursors) cursor.advance(at);
  }
  return { ...slicePage(page, 0, count), covered };
}

class Cursor {
  private index = 0;
  flag: number;
  end: number;

  constructor(private readonly part: ContextStatus) {
    this.flag = part.flags[0]!;
    this.end = part.lengths[0]!;
  }

  /** Goes on where its extent ends at `at`. */
  advance(at: number): void {
    if (this.end > at) return;
    const index = ++this.index;
    if (index === this.part.lengths.length) return;
    this.flag = this.part.flags[index]!;
    this.end += this.part.lengths[index]!;
  }
}

function differs(flags: Uint32Array[], index: number, cursors: readonly Cursor[]): boolean {
  for (let i = 0; i < cursors.length; i++) {
    if (flags[i]![index] !== cursors[i]!.flag) return true;
  }
  return false;
}

function emptyPage(length: number, contexts: number): StatusPage {
  return {
    offset: new Float64Array(length),
    length: new Float64Array(length),
    flags: Array.from({ length: contexts }, () => new Uint32Array(length)),
  };
}

export function slicePage(page: StatusPage, start: number, end: number): StatusPage {
  return {
    offset: page.offset.subarray(start, end),
    length: page.length.subarray(start, end),
    flags: page.flags.map((flags) => flags.subarray(start, end)),
  };
}

/** Gives the last extent of `page` to `following`, where that continues it. */
export function withoutContinued(page: StatusPage, following: StatusPage): StatusPage {
  const last = page.length.length - 1;
  const same = page.flags.every((flags, i) => flags[last] === following.flags[i]![0]);
  if (!same) return page;
  following.offset[0] = page.offset[last]!;
  following.length[0]! += page.length[last]!;
  return slicePage(page, 0, last);
}

/** The part of `page` from `start` to `end`; empty where there is none. */
export function clipPage(page: StatusPage, start: number, end: number): StatusPage {
  const { offset, length } = page;
  let first = 0;
  let past = length.length;
  while (first < past && offset[first]! + length[first]! <= start) first++;
  while (past > first && offset[past - 1]! >= end) past--;
  const clipped = slicePage(page, first, past);
  const count = past - first;
  if (count === 0) return clipped;
  const before = Math.max(0, start - clipped.offset[0]!);
  clipped.offset[0]! += before;
  clipped.length[0]! -= before;
  const beyond = clipped.offset[count - 1]! + clipped.length[count - 1]! - end;
  if (beyond > 0) clipped.length[count - 1]! -= beyond;
  return clipped;
}
