import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { paceFor, RateMeter } from '../../lib/pace.js';

const START = { bytes: 64 * 4096, ranges: 16 };
const MOST = { bytes: 1000 * 4096, ranges: 500 };
const bySize = { chunk: START, most: MOST, depth: 1, adapts: 'size' } as const;
const SHORT = 1;
const LONG = 500;

function after(...times: number[]) {
  const size = paceFor(bySize, 4096);
  for (const milliseconds of times) size.note(milliseconds, 1);
  return size.bounds(Infinity, Infinity);
}

describe('chunks that adapt in size', () => {
  test('starts with what the route says', () => {
    expect(after()).toEqual(START);
  });

  test('stays within its bounds, in whole units, whatever the chunks took', () => {
    const times = fc.array(fc.double({ min: 0, max: 1e7, noNaN: true }), { maxLength: 60, size: 'max' });
    const limit = fc.oneof(fc.constant(Infinity), fc.double({ min: 1e-3, max: 1e9, noNaN: true }));
    fc.assert(
      fc.property(times, limit, limit, fc.constantFrom(512, 4096, 65_536), (noted, speed, iops, unit) => {
        const size = paceFor(bySize, unit);
        for (const time of noted) size.note(time, 1);
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
    expect(after(12.5, 15, 20, 25)).toEqual(START);
  });

  test('settles where chunks take less than 100 ms, for any steady time a byte', () => {
    fc.assert(
      fc.property(fc.double({ min: 1e-6, max: 2e-2, noNaN: true }), (millisecondsByte) => {
        const chunk = { bytes: 2 ** 22, ranges: 64 };
        const size = paceFor({ ...bySize, chunk, most: { bytes: 2 ** 36, ranges: 65_536 } }, 4096);
        const take = () => size.bounds(Infinity, Infinity).bytes * millisecondsByte;
        for (let i = 0; i < 40; i++) size.note(take(), 1);
        for (let i = 0; i < 20; i++) {
          expect(take()).toBeLessThanOrEqual(100);
          size.note(take(), 1);
        }
      }),
    );
  });

  test('cuts a limited run into twentieths of a second', () => {
    const size = paceFor(bySize, 4096);
    expect(size.bounds(20 * 8192, Infinity)).toEqual({ bytes: 8192, ranges: START.ranges });
    expect(size.bounds(Infinity, 100)).toEqual({ bytes: START.bytes, ranges: 5 });
    expect(size.bounds(1, 1)).toEqual({ bytes: 4096, ranges: 1 });
  });

  test('leaves the bounds that it was given alone', () => {
    const start = { ...START };
    paceFor({ ...bySize, chunk: start }, 4096).note(SHORT, 1);
    expect(start).toEqual(START);
  });
});

describe('a window of bytes in flight', () => {
  const MIB = 2 ** 20;
  const byWindow = {
    chunk: { bytes: MIB, ranges: 1 }, most: { bytes: 4 * MIB, ranges: 1 }, depth: 16, adapts: 'window',
  } as const;

  /** Keeps it full over a storage of so many bytes a millisecond, and so many milliseconds of latency. */
  function settled(rate: number, latency: number) {
    const pace = paceFor(byWindow, 65_536);
    let [bytes, chunks] = [0, 0];
    for (let i = 0; i < 500; i++) {
      [bytes, chunks] = [0, 0];
      const chunk = pace.bounds(Infinity, Infinity).bytes;
      for (; pace.admits(chunks, bytes); chunks++) bytes += chunk;
      for (let j = 0; j < chunks; j++) pace.note(Math.max(latency, bytes / rate), chunks);
    }
    return { bytes, chunks, milliseconds: Math.max(latency, bytes / rate) };
  }

  test('settles where no chunk takes longer than 100 ms, down to one unit at a time', () => {
    fc.assert(
      fc.property(fc.double({ min: 2000, max: 1e7, noNaN: true }), (rate) => {
        expect(settled(rate, 0).milliseconds).toBeLessThan(100);
      }),
    );
    expect(settled(1, 0)).toMatchObject({ bytes: 65_536, chunks: 1 });
  });

  test('opens to its bound where a storage has latency and nothing but that', () => {
    expect(settled(1e9, 20)).toMatchObject({ bytes: 64 * MIB, chunks: 16 });
  });

  test('stays as large as keeps a local disk busy where more of it makes chunks slower', () => {
    fc.assert(
      fc.property(fc.double({ min: 300_000, max: 1e7, noNaN: true }), (rate) => {
        const { bytes, chunks } = settled(rate, 0);
        expect(bytes).toBeGreaterThanOrEqual(4 * MIB);
        expect(bytes).toBeLessThanOrEqual(7 * MIB);
        expect(chunks).toBeGreaterThanOrEqual(4);
      }),
    );
  });

  test('opens as far as latency and rate of a storage ask for', () => {
    const [rate, latency] = [2 ** 20, 20];
    const { bytes } = settled(rate, latency);
    expect(bytes).toBeGreaterThanOrEqual(rate * latency);
    expect(bytes).toBeLessThanOrEqual(2 * rate * latency);
  });

  test('opens also where the latency alone is longer than is aimed at', () => {
    expect(settled(1e9, 300).bytes).toBeGreaterThan(8 * MIB);
    expect(settled(20_000, 300).milliseconds).toBeLessThan(450);
  });

  test('does not take one chunk that was held up for the latency of the storage', () => {
    const pace = paceFor({ ...byWindow, chunk: { bytes: 65_536, ranges: 1 } }, 65_536);
    pace.note(400, 1);
    for (let i = 0; i < 100; i++) pace.note(30, 1);
    for (let i = 0; i < 100; i++) pace.note(200, 4);
    expect(pace.bounds(Infinity, Infinity).bytes).toBe(65_536);
  });

  test('starts with what the route says, and lets a limit cut it', () => {
    const pace = paceFor(byWindow, 65_536);
    expect(pace.bounds(Infinity, Infinity).bytes).toBe(MIB / 4);
    expect(pace.bounds(20 * 65_536, Infinity).bytes).toBe(65_536);
    expect(pace.admits(3, MIB)).toBe(false);
    expect(pace.admits(0, MIB)).toBe(true);
  });
});

describe('chunks that a cancel waits for', () => {
  const MIB = 2 ** 20;
  const bounds = { bytes: 4 * MIB, ranges: 64 };
  const byDepth = { chunk: bounds, most: bounds, depth: 8, adapts: 'depth' } as const;

  /** How many are in flight at most after this many chunks, each of which takes what `took` says. */
  function settled(took: (chunks: number) => number, noted = 200) {
    const pace = paceFor(byDepth, 65_536);
    const most = () => [...Array(9).keys()].find((chunks) => !pace.admits(chunks, 0))!;
    for (let i = 0; i < noted; i++) pace.note(took(most()), most());
    expect(pace.bounds(Infinity, Infinity)).toEqual(bounds);
    return most();
  }

  test('are as many as there may be after some fast ones', () => {
    expect(settled(() => 1, 0)).toBe(2);
    expect(settled(() => 1, 6)).toBe(8);
    expect(settled((chunks) => 100 * chunks)).toBe(8);
  });

  test('are as many as take a second, and never fewer than two', () => {
    const each = fc.oneof(fc.double({ min: 0, max: 600, noNaN: true }), fc.double({ min: 0, max: 1e6, noNaN: true }));
    fc.assert(
      fc.property(each, (milliseconds) => {
        const chunks = settled((inFlight) => inFlight * milliseconds);
        // One more is tried now and then.
        expect(chunks <= 3 || (chunks - 1) * milliseconds <= 1000).toBe(true);
        expect(chunks === 8 || (chunks + 1) * milliseconds > 1000).toBe(true);
      }),
    );
  });

  test('stay many where storage has latency of less than a second, and nothing but that', () => {
    for (const latency of [5, 100, 500, 950]) expect(settled(() => latency)).toBe(8);
  });

  test('are cut by a limit', () => {
    expect(paceFor(byDepth, 65_536).bounds(20 * MIB, Infinity)).toEqual({ bytes: MIB, ranges: 64 });
    expect(paceFor(byDepth, 65_536).bounds(Infinity, 40)).toEqual({ bytes: 4 * MIB, ranges: 2 });
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
