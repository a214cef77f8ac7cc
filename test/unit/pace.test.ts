import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ChunkSize, RateMeter } from '../../lib/pace.js';

const START = { bytes: 64 * 4096, ranges: 16 };
const MOST = { bytes: 1000 * 4096, ranges: 500 };
const SHORT = 1;
const LONG = 500;

function after(...times: number[]) {
  const size = new ChunkSize(START, MOST, 4096);
  for (const milliseconds of times) size.note(milliseconds);
  return size.bounds(Infinity, Infinity);
}

describe('ChunkSize', () => {
  test('starts with what the route says', () => {
    expect(after()).toEqual(START);
  });

  test('stays within its bounds, in whole units, whatever the chunks took', () => {
    const times = fc.array(fc.double({ min: 0, max: 1e7, noNaN: true }), { maxLength: 60, size: 'max' });
    const limit = fc.oneof(fc.constant(Infinity), fc.double({ min: 1e-3, max: 1e9, noNaN: true }));
    fc.assert(
      fc.property(times, limit, limit, fc.constantFrom(512, 4096, 65_536), (noted, speed, iops, unit) => {
        const size = new ChunkSize(START, MOST, unit);
        for (const time of noted) size.note(time);
        const { bytes, ranges } = size.bounds(speed, iops);
        expect(bytes % unit).toBe(0);
        expect(bytes).toBeGreaterThanOrEqual(unit);
        expect(bytes).toBeLessThanOrEqual(MOST.bytes);
        expect(Number.isInteger(ranges)).toBe(true);
        expect(ranges).toBeGreaterThanOrEqual(1);
        expect(ranges).toBeLessThanOrEqual(MOST.ranges);
      }),
    );
  });

  test('grows to its bound while chunks are short, at most twofold each time', () => {
    expect(after(SHORT)).toEqual({ bytes: 2 * START.bytes, ranges: 2 * START.ranges });
    expect(after(...Array<number>(20).fill(SHORT))).toEqual(MOST);
  });

  test('shrinks at once by as much as a chunk took too long, and down to one unit', () => {
    const shrunk = after(LONG);
    expect(shrunk.bytes).toBeLessThanOrEqual(START.bytes / 10);
    expect(after(...Array<number>(20).fill(LONG))).toEqual({ bytes: 4096, ranges: 1 });
  });

  test('never grows after a chunk that took 100 ms or more', () => {
    fc.assert(
      fc.property(fc.double({ min: 100, max: 1e6, noNaN: true }), (time) => {
        expect(after(time).bytes).toBeLessThan(START.bytes);
      }),
    );
  });

  test('stays as it is between half of the aim and the aim', () => {
    expect(after(25, 30, 40, 50)).toEqual(START);
  });

  test('settles where chunks take less than 100 ms, for any steady time a byte', () => {
    fc.assert(
      fc.property(fc.double({ min: 1e-6, max: 2e-2, noNaN: true }), (millisecondsByte) => {
        const size = new ChunkSize({ bytes: 2 ** 22, ranges: 64 }, { bytes: 2 ** 36, ranges: 65_536 }, 4096);
        const take = () => size.bounds(Infinity, Infinity).bytes * millisecondsByte;
        for (let i = 0; i < 40; i++) size.note(take());
        for (let i = 0; i < 20; i++) {
          expect(take()).toBeLessThanOrEqual(100);
          size.note(take());
        }
      }),
    );
  });

  test('cuts a limited run into twentieths of a second', () => {
    const size = new ChunkSize(START, MOST, 4096);
    expect(size.bounds(20 * 8192, Infinity)).toEqual({ bytes: 8192, ranges: START.ranges });
    expect(size.bounds(Infinity, 100)).toEqual({ bytes: START.bytes, ranges: 5 });
    expect(size.bounds(1, 1)).toEqual({ bytes: 4096, ranges: 1 });
  });

  test('leaves the bounds that it was given alone', () => {
    const start = { ...START };
    new ChunkSize(start, MOST, 4096).note(SHORT);
    expect(start).toEqual(START);
  });
});

describe('RateMeter', () => {
  test('knows no rate before two moments', () => {
    const meter = new RateMeter();
    expect(meter.note(1000, 0)).toBe(0);
    expect(meter.note(1000, 500)).toBe(0);
  });

  test('tells a steady rate', () => {
    const meter = new RateMeter();
    for (let i = 0; i < 500; i++) {
      const told = meter.note(i * 100, i * 5000);
      if (i > 0) expect(told).toBeCloseTo(50_000, 6);
    }
  });

  test('forgets what is older than some seconds', () => {
    const meter = new RateMeter();
    for (let i = 0; i <= 50; i++) meter.note(i * 100, i * 1_000_000);
    let told = 0;
    for (let i = 51; i <= 100; i++) told = meter.note(i * 100, 50_000_000 + (i - 50) * 100);
    expect(told).toBeCloseTo(1000, 6);
  });

  test('is never negative or not a number while the position grows', () => {
    const steps = fc.array(fc.tuple(fc.nat(10_000), fc.nat(2 ** 40)), { maxLength: 50, size: 'max' });
    fc.assert(
      fc.property(steps, (pairs) => {
        const meter = new RateMeter();
        let [at, position] = [0, 0];
        for (const [milliseconds, bytes] of pairs) {
          [at, position] = [at + milliseconds, position + bytes];
          expect(meter.note(at, position)).toBeGreaterThanOrEqual(0);
        }
      }),
    );
  });
});
