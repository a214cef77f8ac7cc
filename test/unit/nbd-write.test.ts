/** How an export is cut into requests, and what its map means. */
import { describe, expect, test } from 'vitest';
import { extentOf, HOLE, meetsLevel, SERVED_DATA, SERVED_ZEROED, UNKNOWN } from '../../lib/extent.js';
import { servedExtents } from '../../lib/export-extents.js';
import { Planner, type PlanFacts } from '../../lib/plan.js';
import { touchesOf } from '../../lib/routes/nbd-touch.js';
import { piecesOf } from '../../lib/range.js';
import { zeroRuns } from '../../lib/routes/nbd-write.js';
import type { Preallocation } from '../../lib/types.js';
import { random } from '../support/patterns.js';
import { pageOf } from './pages.js';

const STATES = [HOLE, UNKNOWN, SERVED_DATA, SERVED_ZEROED];

test('the four answers of base:allocation are four states', () => {
  const page = { offset: Float64Array.of(0, 1, 2, 3), length: Float64Array.of(1, 1, 1, 1), flags: [Uint32Array.of(3, 1, 0, 2)] };
  expect([...servedExtents(page).state]).toEqual(STATES);
});

test.each([
  [HOLE, true, false, 'hole', false],
  [UNKNOWN, false, true, 'unknown', false],
  [SERVED_DATA, false, true, 'unknown', true],
  [SERVED_ZEROED, true, true, 'unknown', true],
])('state %d: zero %s, data %s, host %s, enough: %s', (state, zero, data, host, enough) => {
  expect(extentOf(0, 1, state, 0)).toMatchObject({ present: true, depth: 0, zero, data, host });
  for (const level of ['falloc', 'full'] as const) expect(meetsLevel(state, level)).toBe(enough);
});

describe('the plan for an export', () => {
  const facts = (fallocate: boolean): PlanFacts => ({ path: 'nbd://x', kind: 'nbd', abilities: { fallocate, unshare: false } });
  const stepsOf = (level: Preallocation, tells = true) => {
    const planner = new Planner(facts(tells), { range: { offset: 0, length: 4 }, level });
    planner.add(pageOf(STATES.map((state, offset) => ({ offset, length: 1, state }))));
    return planner.finish().steps;
  };

  test('takes holes alone, in one route, for a reason that fits', () => {
    const step = { route: 'nbd-write', offset: 0, length: 2 };
    expect(stepsOf('falloc')).toEqual([{ ...step, reason: expect.stringMatching(/allocated by the server/) }]);
    expect(stepsOf('falloc', false)).toEqual([{ ...step, reason: expect.stringMatching(/can’t be told/) }]);
    expect(stepsOf('full')).toEqual([{ ...step, reason: expect.stringMatching(/zeros written as data/) }]);
  });

  test('knows no level metadata', () => {
    expect(() => stepsOf('metadata')).toThrow(expect.objectContaining({ code: 'USAGE' }));
  });
});

describe('pieces', () => {
  test('cover the ranges, are no longer than may be, and end at multiples of the unit', () => {
    const next = random(5);
    for (let round = 0; round < 300; round++) {
      const unit = 2 ** (9 + (next() % 8));
      const most = unit * (1 + (next() % 20));
      const ranges: number[] = [];
      for (let i = 0, at = 0; i < 5; i++) {
        at += 512 * (next() % 1000);
        const length = 512 * (1 + (next() % 5000));
        ranges.push(at, length);
        at += length;
      }
      const pieces = [...piecesOf(ranges, most, unit)];
      const ends = new Set(ranges.flatMap((value, i) => (i % 2 ? [ranges[i - 1]! + value] : [])));
      let index = 0;
      let at = ranges[0]!;
      for (const { offset, length } of pieces) {
        if (at === ranges[index]! + ranges[index + 1]!) at = ranges[(index += 2)]!;
        expect(offset).toBe(at);
        expect(length).toBeGreaterThan(0);
        expect(length).toBeLessThanOrEqual(most);
        at += length;
        expect(at % unit === 0 || ends.has(at)).toBe(true);
      }
      expect(at).toBe(ranges.at(-2)! + ranges.at(-1)!);
    }
  });

  test('are as long as the server takes them, where its unit is longer', () => {
    expect([...piecesOf([512, 2048], 1024, 512)]).toEqual([
      { offset: 512, length: 1024 },
      { offset: 1536, length: 1024 },
    ]);
  });
});

describe('zeros', () => {
  test('are found in whole units, wherever the data begins', () => {
    const next = random(11);
    for (let round = 0; round < 300; round++) {
      const unit = 512;
      const offset = 256 * (next() % 10);
      const data = Buffer.alloc(256 * (1 + (next() % 60)));
      for (let i = next() % 4; i > 0; i--) data[next() % data.length] = 1;
      const taken = new Uint8Array(data.length);
      for (const run of zeroRuns(data, offset, unit)) taken.fill(1, run.offset - offset, run.offset - offset + run.length);
      for (let i = 0; i < data.length; i++) {
        const start = Math.max(0, i - ((offset + i) % unit));
        const end = Math.min(data.length, i - ((offset + i) % unit) + unit);
        expect(taken[i]).toBe(data.subarray(start, end).every((byte) => byte === 0) ? 1 : 0);
      }
    }
  });

  test('of a whole piece are one run', () => {
    expect([...zeroRuns(Buffer.alloc(2 ** 20), 4096, 512)]).toEqual([{ offset: 4096, length: 2 ** 20 }]);
    expect([...zeroRuns(Buffer.alloc(1024, 7), 0, 512)]).toEqual([]);
  });
});

describe('touches of clusters', () => {
  test('reach each cluster of the ranges once, with as little as that takes', () => {
    const next = random(7);
    for (let round = 0; round < 300; round++) {
      const cluster = 512 * 2 ** (next() % 8);
      const first = cluster * (next() % 50);
      const count = 1 + (next() % 40);
      const short = next() % 2 ? 512 : 0;
      const length = cluster * count - (cluster > 512 ? short : 0);
      const reached = new Map<number, number>();
      let covered = 0;
      for (const { spot, covers } of touchesOf([first, length], cluster)) {
        expect(spot.offset).toBeGreaterThanOrEqual(first);
        expect(spot.offset + spot.length).toBeLessThanOrEqual(first + length);
        expect(spot.length).toBeLessThanOrEqual(1024);
        for (const at of [spot.offset, spot.offset + spot.length - 1]) reached.set(Math.floor(at / cluster), covered);
        covered += covers;
      }
      expect(covered).toBe(length);
      expect(reached.size).toBe(count);
    }
  });

  test.each([
    [65536, 65536, [[65536, 512]]],
    [0, 131072, [[65024, 1024]]],
    [0, 196608, [[65024, 1024], [131072, 512]]],
    [131072, 66048, [[196096, 1024]]],
  ])('from %d on %d bytes are %j', (offset, length, spots) => {
    expect([...touchesOf([offset, length], 65536)].map(({ spot }) => [spot.offset, spot.length])).toEqual(spots);
  });
});
