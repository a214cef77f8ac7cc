import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { HOLE, meetsLevel, SHARED, UNKNOWN, UNWRITTEN, WRITTEN } from '../../lib/extent.js';
import { checkRequest, Planner, routeFor, type Plan, type PlanFacts, type PlanRequest } from '../../lib/plan.js';
import { endOf } from '../../lib/range.js';
import type { PlanStep, Preallocation, RouteName } from '../../lib/types.js';
import { pageOf, type Piece } from './pages.js';

const STATES = [HOLE, UNWRITTEN, WRITTEN, SHARED, UNKNOWN];
const ROUTES: RouteName[] = ['fallocate', 'zero-write', 'unshare', 'device'];
const LETTERS: Record<string, RouteName | null> = {
  F: 'fallocate', Z: 'zero-write', U: 'unshare', D: 'device', '-': null,
};

/**
 * What the storage can do (f: fallocate, u: unshare; or a block device), the level, the forced
 * route, and the route of a hole, an unwritten, a written, a shared and an unknown extent.
 */
const TABLE = `
  fu     falloc  none        F - - U F
  f      falloc  none        F - - - F
  u      falloc  none        Z - - U Z
  -      falloc  none        Z - - - Z
  fu     full    none        Z Z - U Z
  f      full    none        Z Z - - Z
  u      full    none        Z Z - U Z
  -      full    none        Z Z - - Z

  fu     falloc  fallocate   F - - U F
  f      falloc  fallocate   F - - - F
  u      falloc  fallocate   F - - U F
  -      falloc  fallocate   F - - - F
  fu     full    fallocate   - - - U -
  f      full    fallocate   - - - - -
  u      full    fallocate   - - - U -
  -      full    fallocate   - - - - -

  fu     falloc  zero-write  Z - - U Z
  f      falloc  zero-write  Z - - - Z
  u      falloc  zero-write  Z - - U Z
  -      falloc  zero-write  Z - - - Z
  fu     full    zero-write  Z Z - U Z
  f      full    zero-write  Z Z - - Z
  u      full    zero-write  Z Z - U Z
  -      full    zero-write  Z Z - - Z

  fu     falloc  unshare     - - - U -
  f      falloc  unshare     - - - - -
  u      falloc  unshare     - - - U -
  -      falloc  unshare     - - - - -
  fu     full    unshare     - - - U -
  f      full    unshare     - - - - -
  u      full    unshare     - - - U -
  -      full    unshare     - - - - -

  block  falloc  none        D - - - D
  block  full    none        D D - - D
  block  falloc  device      D - - - D
  block  full    device      D D - - D
`;

function factsOf(storage: string): PlanFacts {
  const abilities = { fallocate: storage.includes('f'), unshare: storage.includes('u') };
  return storage === 'block'
    ? { path: 'disk', kind: 'block', abilities: { fallocate: false, unshare: false } }
    : { path: 'disk', kind: 'file', abilities };
}

function requestOf(level: string, route: string | undefined, length = 0): PlanRequest {
  const range = { offset: 0, length };
  return { range, level: level as Preallocation, route: route === 'none' ? undefined : (route as RouteName) };
}

const ROWS = TABLE.trim().split('\n').map((line) => line.trim()).filter(Boolean).map((line) => {
  const [storage = '', level = '', forced = '', ...letters] = line.split(/\s+/);
  return { storage, level, forced, letters };
});

describe('routeFor', () => {
  test.each(ROWS)('$storage $level, forced: $forced', ({ storage, level, forced, letters }) => {
    const routes = STATES.map((state) => routeFor(state, factsOf(storage), requestOf(level, forced)));
    expect(routes).toEqual(letters.map((letter) => LETTERS[letter]));
  });

  test('has a row in the table for every request that checkRequest lets pass', () => {
    for (const storage of ['fu', 'f', 'u', '-', 'block']) {
      for (const level of ['falloc', 'full']) {
        for (const forced of ['none', ...ROUTES]) {
          const refused = codeOf(() => checkRequest(factsOf(storage), requestOf(level, forced)));
          const row = ROWS.find((r) => r.storage === storage && r.level === level && r.forced === forced);
          expect(refused === undefined && row === undefined).toBe(false);
        }
      }
    }
  });
});

describe('checkRequest', () => {
  test.each([
    ['fu', 'metadata', 'none'],
    ['block', 'metadata', 'none'],
    ['block', 'metadata', 'device'],
    ['fu', 'falloc', 'device'],
    ['fu', 'full', 'device'],
    ['fu', 'full', 'fallocate'],
    ['block', 'falloc', 'fallocate'],
    ['block', 'falloc', 'zero-write'],
    ['block', 'full', 'unshare'],
  ])('refuses %s %s with the route %s as USAGE', (storage, level, route) => {
    const request = requestOf(level, route);
    expect(codeOf(() => checkRequest(factsOf(storage), request))).toBe('USAGE');
    expect(codeOf(() => new Planner(factsOf(storage), request))).toBe('USAGE');
  });

  test.each([
    ['-', 'falloc', 'fallocate'],
    ['-', 'full', 'zero-write'],
    ['fu', 'full', 'unshare'],
    ['block', 'full', 'device'],
  ])('lets %s %s with the route %s pass', (storage, level, route) => {
    expect(codeOf(() => checkRequest(factsOf(storage), requestOf(level, route)))).toBeUndefined();
  });

  test('names the file', () => {
    expect(() => checkRequest(factsOf('fu'), requestOf('metadata', 'none'))).toThrow(/on "disk"/);
  });
});

interface Layout {
  pieces: Piece[];
  pageLengths: number[];
  storage: string;
  level: Preallocation;
  route: RouteName | undefined;
}

const layout: fc.Arbitrary<Layout> = fc
  .record({
    extents: fc.array(fc.record({ length: fc.integer({ min: 1, max: 9 }), state: fc.constantFrom(...STATES) }), {
      maxLength: 60, size: 'max',
    }),
    pageLengths: fc.array(fc.integer({ min: 1, max: 7 }), { minLength: 1, maxLength: 5 }),
    storage: fc.constantFrom('fu', 'f', 'u', '-', 'block'),
    level: fc.constantFrom<Preallocation>('falloc', 'full'),
    route: fc.constantFrom(undefined, ...ROUTES),
  })
  .map(({ extents, ...rest }) => {
    let offset = 0;
    const pieces = extents.map(({ length, state }) => {
      const piece = { offset, length, state };
      offset += length;
      return piece;
    });
    return { pieces, ...rest };
  })
  .filter(({ storage, level, route }) => !codeOf(() => checkRequest(factsOf(storage), requestOf(level, route))));

function planFor({ pieces, pageLengths, storage, level, route }: Layout): Plan {
  const planner = new Planner(factsOf(storage), requestOf(level, route, totalOf(pieces)));
  for (let i = 0, page = 0; i < pieces.length; page++) {
    const length = pageLengths[page % pageLengths.length]!;
    planner.add(pageOf(pieces.slice(i, i + length)));
    i += length;
  }
  return planner.finish();
}

/** For each byte the routes of the steps that cover it. */
function routesByByte(steps: PlanStep[], length: number): RouteName[][] {
  const routes = Array.from({ length }, (): RouteName[] => []);
  for (const step of steps) for (let at = step.offset; at < endOf(step); at++) routes[at]!.push(step.route);
  return routes;
}

describe('a plan', () => {
  test('covers each missing byte that has a route by one step of that route, and no other byte', () => {
    fc.assert(
      fc.property(layout, (given) => {
        const plan = planFor(given);
        const facts = factsOf(given.storage);
        const expected = given.pieces.flatMap(({ length, state }) => {
          const route = routeFor(state, facts, requestOf(given.level, given.route));
          return Array.from({ length }, () => (route === null ? [] : [route]));
        });
        expect(plan.survey.exact).toBe(true);
        expect(routesByByte(plan.steps, totalOf(given.pieces))).toEqual(expected);
      }),
    );
  });

  test('lists the steps of a route together and in ascending order, none touching the next', () => {
    fc.assert(
      fc.property(layout, (given) => {
        const { steps } = planFor(given);
        const order = [...new Set(steps.map((step) => step.route))];
        expect(steps.map((step) => step.route)).toEqual(order.flatMap((route) => steps.filter((s) => s.route === route).map(() => route)));
        steps.forEach((step, i) => {
          const next = steps[i + 1];
          if (next?.route === step.route) expect(next.offset).toBeGreaterThan(endOf(step));
        });
      }),
    );
  });

  test('has one pass for each route of its steps, around them and with their bytes', () => {
    fc.assert(
      fc.property(layout, (given) => {
        const { steps, passes } = planFor(given);
        expect(passes.map((pass) => pass.route)).toEqual([...new Set(steps.map((step) => step.route))]);
        for (const { route, range, bytes } of passes) {
          const own = steps.filter((step) => step.route === route);
          expect(range.offset).toBe(own[0]!.offset);
          expect(endOf(range)).toBe(endOf(own.at(-1)!));
          expect(bytes).toBe(totalOf(own));
        }
      }),
    );
  });

  test('unshares first: what is shared may not be counted on while other blocks are taken', () => {
    const pieces = [HOLE, SHARED].map((state, i) => ({ offset: i, length: 1, state }));
    const { passes } = planFor({ pieces, pageLengths: [9], storage: 'fu', level: 'falloc', route: undefined });
    expect(passes.map((pass) => pass.route)).toEqual(['unshare', 'fallocate']);
  });

  test('is empty for an empty range', () => {
    const plan = planFor({ pieces: [], pageLengths: [1], storage: 'fu', level: 'falloc', route: undefined });
    expect(plan.steps).toEqual([]);
    expect(plan.passes).toEqual([]);
    expect(plan.survey).toMatchObject({ met: 0, missing: 0, needed: 0, pieces: 0, missingRanges: [], exact: true });
  });

  test('gives every step a reason', () => {
    fc.assert(fc.property(layout, (given) => planFor(given).steps.every(({ reason }) => reason.length > 10)));
  });

  test('still covers everything missing when there is too much of it to list', () => {
    const pieces = Array.from({ length: 200_000 }, (_, i) => ({
      offset: i * 4096, length: 4096, state: i % 2 ? WRITTEN : HOLE,
    }));
    const given: Layout = { pieces, pageLengths: [8192], storage: 'fu', level: 'falloc', route: undefined };
    const { steps, passes, survey } = planFor(given);
    expect(survey).toMatchObject({ exact: false, met: 100_000 * 4096, missing: 100_000 * 4096, pieces: 100_000 });
    expect(steps.length).toBeLessThanOrEqual(65_536);
    expect(survey.missingRanges.length).toBeLessThanOrEqual(65_536);
    let step = 0;
    for (const { offset, length, state } of pieces) {
      if (state === WRITTEN) continue;
      while (endOf(steps[step]!) <= offset) step++;
      expect(steps[step]!.offset <= offset && endOf(steps[step]!) >= offset + length).toBe(true);
    }
    expect(passes[0]!.bytes).toBe(100_000 * 4096);
  });
});

describe('a survey', () => {
  test('counts every byte once, as met or as missing', () => {
    fc.assert(
      fc.property(layout, (given) => {
        const { survey } = planFor(given);
        const sumOf = (wanted: (state: number) => boolean) => totalOf(given.pieces.filter(({ state }) => wanted(state)));
        expect(survey.met + survey.missing).toBe(totalOf(given.pieces));
        expect(survey.met).toBe(sumOf((state) => meetsLevel(state, given.level)));
        const request = requestOf(given.level, given.route);
        const takesBlocks = (state: number) => state !== UNWRITTEN && routeFor(state, factsOf(given.storage), request) !== null;
        expect(survey.needed).toBe(sumOf(takesBlocks));
        expect(survey.shared).toBe(sumOf((state) => state === SHARED));
        expect(survey.unknown).toBe(sumOf((state) => state === UNKNOWN));
      }),
    );
  });

  test('lists what is missing in ascending order, without overlap, each range with its reason', () => {
    fc.assert(
      fc.property(layout, (given) => {
        const { missingRanges, missing } = planFor(given).survey;
        expect(totalOf(missingRanges)).toBe(missing);
        missingRanges.forEach(({ offset, why }, i) => {
          if (i > 0) expect(offset).toBeGreaterThanOrEqual(endOf(missingRanges[i - 1]!));
          const piece = given.pieces.find((p) => p.offset <= offset && endOf(p) > offset);
          expect(why.startsWith(['hole', 'unwritten', 'written', 'shared', 'unknown'][piece!.state]!)).toBe(true);
        });
      }),
    );
  });
});

function totalOf(ranges: readonly { length: number }[]): number {
  return ranges.reduce((sum, { length }) => sum + length, 0);
}

function codeOf(work: () => unknown): string | undefined {
  try {
    work();
    return undefined;
  } catch (error) {
    expect(error).toBeInstanceOf(ThickenError);
    return (error as ThickenError).code;
  }
}
