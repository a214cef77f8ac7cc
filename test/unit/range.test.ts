import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { checkBytes, clip, endOf, resolveRange, roundDown, roundUp, widen } from '../../lib/range.js';

const MOST = Number.MAX_SAFE_INTEGER;
const UNIVERSE = 64;

const smallRange = fc
  .tuple(fc.nat(UNIVERSE), fc.nat(UNIVERSE))
  .map(([a, b]) => ({ offset: Math.min(a, b), length: Math.abs(a - b) }));

function bytesOf({ offset, length }: { offset: number; length: number }): Set<number> {
  return new Set(Array.from({ length }, (_, i) => offset + i));
}

describe('rounding', () => {
  test('goes to the nearest multiple in its direction', () => {
    const anyUnit = fc.constantFrom(1, 3, 512, 4096, 65_536, 2 ** 30);
    fc.assert(
      fc.property(fc.maxSafeNat(), anyUnit, (value, unit) => {
        fc.pre(value <= MOST - unit);
        const down = roundDown(value, unit);
        const up = roundUp(value, unit);
        expect(down % unit).toBe(0);
        expect(up % unit).toBe(0);
        expect(value - down).toBeLessThan(unit);
        expect(up - value).toBeLessThan(unit);
        expect(down).toBeLessThanOrEqual(value);
        expect(up).toBeGreaterThanOrEqual(value);
      }),
    );
  });
});

describe('clip', () => {
  test('gives exactly the bytes that both ranges have', () => {
    fc.assert(
      fc.property(smallRange, smallRange, (range, bounds) => {
        const both = [...bytesOf(range)].filter((byte) => bytesOf(bounds).has(byte));
        expect([...bytesOf(clip(range, bounds))]).toEqual(both);
      }),
    );
  });

  test('stays inside the bounds even where nothing is left', () => {
    fc.assert(
      fc.property(smallRange, smallRange, (range, bounds) => {
        const left = clip(range, bounds);
        expect(left.offset).toBeGreaterThanOrEqual(bounds.offset);
        expect(endOf(left)).toBeLessThanOrEqual(endOf(bounds));
      }),
    );
  });
});

describe('widen', () => {
  const request = fc
    .tuple(fc.integer({ min: 1, max: UNIVERSE }), smallRange, fc.integer({ min: 1, max: 9 }))
    .filter(([size, range]) => endOf(range) <= size);

  test('covers the range with the fewest whole units that can, clipped to the size', () => {
    fc.assert(
      fc.property(request, ([size, range, unit]) => {
        const touched = new Set([...bytesOf(range)].map((byte) => Math.floor(byte / unit)));
        const expected = Array.from({ length: size }, (_, byte) => byte).filter((byte) =>
          touched.has(Math.floor(byte / unit)),
        );
        expect([...bytesOf(widen(range, unit, size))]).toEqual(expected);
      }),
    );
  });

  test('changes nothing when done again', () => {
    fc.assert(
      fc.property(request, ([size, range, unit]) => {
        const once = widen(range, unit, size);
        expect(widen(once, unit, size)).toEqual(once);
      }),
    );
  });

  test('leaves an empty range empty, where it is', () => {
    expect(widen({ offset: 5, length: 0 }, 4096, 10_000)).toEqual({ offset: 5, length: 0 });
  });

  test('ends at the end of an image that is no multiple of the unit', () => {
    expect(widen({ offset: 4097, length: 1 }, 4096, 5000)).toEqual({ offset: 4096, length: 904 });
  });

  test('is exact at the end of the largest image', () => {
    const last = { offset: MOST - 1, length: 1 };
    expect(endOf(widen(last, 4096, MOST))).toBe(MOST);
  });
});

describe('checkBytes', () => {
  const bad = [-1, -0.5, 0.5, 1.5, NaN, Infinity, -Infinity, 2 ** 53, '5', 5n, null, {}, [], true];

  test.each(bad.map((value) => [value]))('refuses %s with an error of both classes', (value) => {
    const error = caught(() => checkBytes('offset', value));
    expect(error).toBeInstanceOf(RangeError);
    expect(error).toBeInstanceOf(ThickenError);
    expect((error as ThickenError).code).toBe('RANGE');
    expect((error as Error).message).toMatch(/^offset is .+; give a whole number of bytes/);
  });

  test('gives back every whole number from 0 to 2^53-1', () => {
    fc.assert(fc.property(fc.maxSafeNat(), (value) => checkBytes('x', value) === value));
    expect(checkBytes('x', MOST)).toBe(MOST);
  });
});

describe('resolveRange', () => {
  test('reaches from the start to the end where the request is silent', () => {
    expect(resolveRange({}, 1000, 'disk')).toEqual({ offset: 0, length: 1000 });
    expect(resolveRange({ offset: 400 }, 1000, 'disk')).toEqual({ offset: 400, length: 600 });
    expect(resolveRange({ length: 10 }, 1000, 'disk')).toEqual({ offset: 0, length: 10 });
    expect(resolveRange({}, 0, 'disk')).toEqual({ offset: 0, length: 0 });
  });

  test('allows no bytes at the very end', () => {
    expect(resolveRange({ offset: 1000 }, 1000, 'disk')).toEqual({ offset: 1000, length: 0 });
  });

  test('accepts a range if and only if it lies inside the image', () => {
    const numbers = fc.tuple(fc.nat(20), fc.nat(20), fc.nat(20));
    fc.assert(
      fc.property(numbers, ([offset, length, size]) => {
        const resolve = () => resolveRange({ offset, length }, size, 'disk');
        if (offset + length <= size) expect(resolve()).toEqual({ offset, length });
        else expect(caught(resolve)).toMatchObject({ code: 'RANGE', path: 'disk', offset, length });
      }),
    );
  });

  test('refuses a start beyond the end, with or without a length', () => {
    expect(caught(() => resolveRange({ offset: 11 }, 10, 'disk'))).toMatchObject({ code: 'RANGE' });
    expect(caught(() => resolveRange({ offset: 11, length: 0 }, 10, 'disk'))).toBeInstanceOf(RangeError);
  });

  test('refuses a sum beyond 2^53', () => {
    const request = { offset: MOST, length: MOST };
    expect(caught(() => resolveRange(request, MOST, 'disk'))).toBeInstanceOf(RangeError);
  });
});

function caught(work: () => unknown): unknown {
  try {
    work();
  } catch (error) {
    return error;
  }
  throw new Error('did not throw');
}
