import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { bytesOf, RangeQueue } from '../../lib/range-queue.js';

/** Ranges as offset, length, …, each in a place of its own. */
const ranges = fc
  .array(fc.integer({ min: 1, max: 9 }), { maxLength: 12 })
  .map((lengths) => Float64Array.from(lengths.flatMap((length, i) => [i * 10, length])));
const most = fc.record({ bytes: fc.integer({ min: 1, max: 40 }), ranges: fc.integer({ min: 1, max: 6 }) });

/** Each byte by its offset. */
function bytesIn(flat: Float64Array): number[] {
  const bytes: number[] = [];
  for (let i = 0; i < flat.length; i += 2) {
    for (let at = 0; at < flat[i + 1]!; at++) bytes.push(flat[i]! + at);
  }
  return bytes;
}

describe('RangeQueue', () => {
  test('gives the bytes that were added, in their order, and is true to its bounds', () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(ranges, most, fc.nat(3)), { maxLength: 8 }), (rounds) => {
        const queue = new RangeQueue();
        const waiting: number[] = [];
        for (const [added, bounds, takes] of rounds) {
          queue.add(added);
          waiting.push(...bytesIn(added));
          for (let i = 0; i < takes; i++) {
            const taken = queue.take(bounds);
            const bytes = bytesIn(taken);
            expect(bytes).toEqual(waiting.splice(0, bytes.length));
            expect(bytes.length).toBeLessThanOrEqual(bounds.bytes);
            expect(taken.length / 2).toBeLessThanOrEqual(bounds.ranges);
            const full = bytes.length === bounds.bytes || taken.length / 2 === bounds.ranges;
            expect(full || waiting.length === 0).toBe(true);
          }
          expect(queue.bytes).toBe(waiting.length);
        }
      }),
    );
  });

  test('takes again first what was put back', () => {
    fc.assert(
      fc.property(ranges, most, most, (added, first, second) => {
        const queue = new RangeQueue();
        queue.add(added);
        const taken = queue.take(first);
        queue.putBack(taken);
        expect(queue.bytes).toBe(bytesOf(added));
        const again = bytesIn(queue.take(second));
        expect(again).toEqual(bytesIn(added).slice(0, again.length));
      }),
    );
  });

  test('fills a chunk by its bytes or by its number of ranges', () => {
    const queue = new RangeQueue();
    queue.add(Float64Array.of(0, 4, 10, 4));
    expect(queue.fills({ bytes: 8, ranges: 9 })).toBe(true);
    expect(queue.fills({ bytes: 9, ranges: 2 })).toBe(true);
    expect(queue.fills({ bytes: 9, ranges: 3 })).toBe(false);
  });

  test('leaves alone what it was given', () => {
    const given = Float64Array.of(0, 8, 10, 8);
    const queue = new RangeQueue();
    queue.add(given);
    const taken = queue.take({ bytes: 3, ranges: 1 });
    queue.take({ bytes: 3, ranges: 1 });
    expect([...given]).toEqual([0, 8, 10, 8]);
    expect([...taken]).toEqual([0, 3]);
  });
});
