/** Byte ranges: the only place that rounds. */
import { inspect } from 'node:util';
import { rangeError } from './errors.js';
import type { ByteRange } from './types.js';

export function endOf(range: ByteRange): number {
  return range.offset + range.length;
}

/** The part of `range` inside `bounds`; of length 0 where there is none. */
export function clip(range: ByteRange, bounds: ByteRange): ByteRange {
  const offset = Math.min(Math.max(range.offset, bounds.offset), endOf(bounds));
  const end = Math.min(Math.max(endOf(range), offset), endOf(bounds));
  return { offset, length: end - offset };
}

export function roundDown(value: number, unit: number): number {
  return value - (value % unit);
}

export function roundUp(value: number, unit: number): number {
  const rest = value % unit;
  return rest === 0 ? value : value + (unit - rest);
}

/** Throws RANGE (a RangeError) unless `value` is a whole number of bytes from 0 to 2^53-1. */
export function checkBytes(name: string, value: unknown): number {
  if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) return value;
  throw rangeError(`${name} is ${describe(value)}`, 'give a whole number of bytes, 0 to 2^53-1');
}

function describe(value: unknown): string {
  return inspect(value, { depth: 0, breakLength: Infinity });
}

/**
 * The byte range that a request names in an image of `size` bytes: from 0 and to the end where it
 * is silent. Throws RANGE where it reaches beyond the end.
 */
export function resolveRange(
  request: { offset?: number | undefined; length?: number | undefined },
  size: number,
  path: string,
): ByteRange {
  const offset = checkBytes('offset', request.offset ?? 0);
  const length = checkBytes('length', request.length ?? Math.max(0, size - offset));
  if (offset + length > size) {
    throw rangeError(
      `the range ends at byte ${offset + length}, beyond the image's ${size} bytes`,
      'give a smaller offset or length',
      { path, offset, length },
    );
  }
  return { offset, length };
}

/** `range` widened outward to multiples of `granularity`, and clipped to an image of `size`. */
export function widen(range: ByteRange, granularity: number, size: number): ByteRange {
  if (range.length === 0) return { ...range };
  const offset = roundDown(range.offset, granularity);
  const end = Math.min(roundUp(endOf(range), granularity), size);
  return { offset, length: end - offset };
}

/**
 * `ranges` (offset, length, …) in pieces of at most `most` bytes, cut at multiples of `unit` where that
 * is no more than `most`.
 */
export function* piecesOf(ranges: ArrayLike<number>, most: number, unit: number): Generator<ByteRange> {
  for (let i = 0; i < ranges.length; i += 2) {
    const end = ranges[i]! + ranges[i + 1]!;
    for (let offset = ranges[i]!; offset < end; ) {
      const aligned = roundDown(offset + most, unit);
      const next = Math.min(end, aligned > offset ? aligned : offset + most);
      yield { offset, length: next - offset };
      offset = next;
    }
  }
}
