/** What is planned for a disk that a QEMU has open, and what its states mean. */
import { describe, expect, test } from 'vitest';
import {
  ABSENT,
  BACKED_DATA,
  BACKED_ZERO,
  BACKED_ZEROED,
  extentOf,
  meetsLevel,
  OWN_DATA,
  OWN_ZERO,
  OWN_ZEROED,
  UNALLOCATED,
  whyMissing,
} from '../../lib/extent.js';
import { checkRequest, Planner, routeFor, type PlanFacts, type PlanRequest } from '../../lib/plan.js';
import { extentsOf } from '../../lib/qemu/nbd-extents.js';
import { pageOf } from './pages.js';

const BACKED = [BACKED_DATA, BACKED_ZERO, BACKED_ZEROED, ABSENT];
const ALONE = [OWN_DATA, OWN_ZERO, OWN_ZEROED, UNALLOCATED];
const SIZE = 2 ** 20;

const facts: PlanFacts = {
  path: 'disk',
  kind: 'guest',
  abilities: { fallocate: false, unshare: false },
  backed: true,
};

function request(more: Partial<PlanRequest> = {}): PlanRequest {
  return { range: { offset: 0, length: SIZE }, level: 'metadata', ...more };
}

/** A plan of one extent of each state. */
function routesOf(states: readonly number[], of: PlanFacts, asked: PlanRequest): string[] {
  const planner = new Planner(of, asked);
  const length = SIZE / states.length;
  planner.add(pageOf(states.map((state, i) => ({ offset: i * length, length, state }))));
  return planner.finish().passes.map(({ route }) => route);
}

describe('a state', () => {
  test.each([
    [OWN_DATA, true, false, true],
    [OWN_ZERO, true, true, false],
    [OWN_ZEROED, true, true, true],
    [BACKED_DATA, true, false, true],
    [BACKED_ZERO, true, true, false],
    [BACKED_ZEROED, true, true, true],
    [ABSENT, false, true, false],
    [UNALLOCATED, false, true, false],
  ])('%d is present: %s, zero: %s, data: %s', (state, present, zero, data) => {
    expect(extentOf(0, 1, state, 0, 2)).toMatchObject({ present, zero, data, depth: 2, host: 'unknown' });
  });

  test('is enough where no other file is needed', () => {
    for (const state of ALONE) expect(meetsLevel(state, 'metadata')).toBe(true);
    for (const state of BACKED) {
      expect(meetsLevel(state, 'metadata')).toBe(false);
      expect(whyMissing(state, 0)).toMatch(/^(backing|absent): /);
    }
  });

  test('is read from what an NBD server tells', () => {
    const [hole, zero] = [1, 2];
    const page = {
      offset: Float64Array.from([0, 1, 2, 3, 4, 5, 6]),
      length: new Float64Array(7).fill(1),
      flags: [
        Uint32Array.from([0, zero, hole | zero, 0, zero, hole | zero, hole | zero]),
        Uint32Array.from([1, 1, 1, 2, 2, 3, 0]),
      ],
    };
    const states = [OWN_DATA, OWN_ZEROED, OWN_ZERO, BACKED_DATA, BACKED_ZEROED, BACKED_ZERO];
    expect([...extentsOf(page, 2).state]).toEqual([...states, ABSENT]);
    expect([...extentsOf(page, 0).state]).toEqual([...states, UNALLOCATED]);
    expect([...extentsOf(page, 2).depth!]).toEqual([0, 0, 0, 1, 1, 2, 2]);
  });
});

describe('the plan for a guest’s disk', () => {
  test('populates what others have, and that alone', () => {
    for (const state of BACKED) expect(routeFor(state, facts, request())).toBe('populate');
    for (const state of ALONE) expect(routeFor(state, facts, request())).toBeNull();
  });

  test.each([
    [{}, {}, ['populate']],
    [{}, { dropBacking: true }, ['stream']],
    [{}, { route: 'stream' }, ['stream']],
    [{}, { route: 'populate', dropBacking: true }, ['populate', 'stream']],
    [{ subclusters: true }, {}, ['populate']],
    [{ subclusters: true }, { dropBacking: true }, ['populate', 'stream']],
  ] as const)('of %o, asked %o, is %o', (more, asked, routes) => {
    expect(routesOf([...BACKED, ...ALONE], { ...facts, ...more }, request(asked))).toEqual(routes);
  });

  test('ends a dependence that nothing has any more', () => {
    expect(routesOf(ALONE, facts, request({ dropBacking: true }))).toEqual(['stream']);
    expect(routesOf(ALONE, { ...facts, backed: false }, request({ dropBacking: true }))).toEqual([]);
    expect(routesOf(ALONE, facts, request())).toEqual([]);
  });

  test('never streams where clusters are mapped in parts', () => {
    const check = () => checkRequest({ ...facts, subclusters: true }, request({ route: 'stream' }));
    expect(check).toThrow(expect.objectContaining({ code: 'USAGE' }));
  });
});
