import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { endOf } from '../../lib/range.js';
import { RangeList } from '../../lib/range-list.js';

/** Ranges in ascending order, as gaps and lengths. */
const ascending = (most: number) =>
  fc.array(fc.tuple(fc.nat(most), fc.integer({ min: 1, max: most })), { maxLength: 200, size: 'max' }).map((pairs) => {
    let end = 0;
    return pairs.map(([gap, length]) => {
      const offset = end + gap;
      end = offset + length;
      return { offset, length };
    });
  });

function listOf(ranges: { offset: number; length: number }[], most: number): RangeList {
  const list = new RangeList(most);
  for (const { offset, length } of ranges) list.add(offset, length);
  return list;
}

describe('RangeList', () => {
  test('joins what touches, and nothing else, while there is room', () => {
    const list = listOf([{ offset: 0, length: 4 }, { offset: 4, length: 4 }, { offset: 9, length: 1 }], 8);
    expect(list.list()).toEqual([{ offset: 0, length: 8 }, { offset: 9, length: 1 }]);
    expect(list.exact).toBe(true);
  });

  test('has exactly the bytes that were added, while it is exact', () => {
    fc.assert(
      fc.property(ascending(4), (ranges) => {
        const list = listOf(ranges, 1000);
        expect(list.exact).toBe(true);
        expect(bytesIn(list.list())).toEqual(bytesIn(ranges));
      }),
    );
  });

  test('covers all that was added, in ascending order, within its bound', () => {
    fc.assert(
      fc.property(ascending(100_000), fc.integer({ min: 2, max: 20 }), (ranges, most) => {
        const kept = listOf(ranges, most).list();
        expect(kept.length).toBeLessThanOrEqual(most);
        for (let i = 1; i < kept.length; i++) expect(kept[i]!.offset).toBeGreaterThan(endOf(kept[i - 1]!));
        for (const range of ranges) {
          expect(kept.some((k) => k.offset <= range.offset && endOf(k) >= endOf(range))).toBe(true);
        }
      }),
    );
  });

  test('starts and ends where what was added starts and ends', () => {
    fc.assert(
      fc.property(ascending(100_000), (ranges) => {
        fc.pre(ranges.length > 0);
        const kept = listOf(ranges, 4).list();
        expect(kept[0]!.offset).toBe(ranges[0]!.offset);
        expect(endOf(kept.at(-1)!)).toBe(endOf(ranges.at(-1)!));
      }),
    );
  });

  test('counts the bytes added exactly, merged or not', () => {
    fc.assert(
      fc.property(ascending(100_000), fc.integer({ min: 2, max: 20 }), (ranges, most) => {
        const added = ranges.reduce((sum, { length }) => sum + length, 0);
        expect(listOf(ranges, most).bytes).toBe(added);
      }),
    );
  });

  test('claims to be exact only where it covers no byte more', () => {
    fc.assert(
      fc.property(ascending(100_000), fc.integer({ min: 2, max: 20 }), (ranges, most) => {
        const list = listOf(ranges, most);
        const covered = list.list().reduce((sum, { length }) => sum + length, 0);
        if (list.exact) expect(covered).toBe(list.bytes);
        expect(covered).toBeGreaterThanOrEqual(list.bytes);
      }),
    );
  });

  test('merges across the smallest gaps first', () => {
    const near = [0, 5000, 10_000, 15_000, 20_000].map((offset) => ({ offset, length: 4000 }));
    const far = [2 ** 40, 2 ** 41].map((offset) => ({ offset, length: 1 }));
    const list = listOf([...near, ...far], 6);
    expect(list.list()).toEqual([{ offset: 0, length: 24_000 }, ...far]);
    expect(list.exact).toBe(false);
  });
});

function bytesIn(ranges: readonly { offset: number; length: number }[]): number[] {
  return ranges.flatMap(({ offset, length }) => Array.from({ length }, (_, i) => offset + i));
}
