import { describe, expect, test } from 'vitest';
import {
  ABSENT,
  BACKED_DATA,
  BACKED_ZERO,
  OWN_DATA,
  OWN_ZERO,
  UNALLOCATED,
} from '../../lib/extent.js';
import { Planner, type Plan, type PlanFacts, type PlanRequest } from '../../lib/plan.js';
import { extentsOf } from '../../lib/qemu/nbd-extents.js';
import { pageOf } from './pages.js';

const CLUSTER = 65_536;
const STATES = [BACKED_DATA, OWN_DATA, BACKED_ZERO, OWN_ZERO, ABSENT];
const range = { offset: 0, length: STATES.length * CLUSTER };

function planFor(facts: Partial<PlanFacts> = {}, request: Partial<PlanRequest> = {}, states = STATES): Plan {
  const guest: PlanFacts = {
    path: 'monitor#disk', kind: 'guest', abilities: { fallocate: false, unshare: false }, backed: true, ...facts,
  };
  const planner = new Planner(guest, { range, level: 'falloc', ...request });
  planner.add(pageOf(states.map((state, i) => ({ offset: i * CLUSTER, length: CLUSTER, state }))));
  return planner.finish();
}

const routesOf = (plan: Plan) => plan.passes.map(({ route }) => route);
const codeOf = (run: () => unknown): unknown => {
  try {
    run();
  } catch (error) {
    return (error as { code?: string }).code;
  }
  return undefined;
};

describe('a disk that a guest uses', () => {
  test('has populated what depends on a backing file, zeros and absent regions too', () => {
    const plan = planFor();
    expect(plan.steps.map(({ route, offset }) => [route, offset / CLUSTER])).toEqual([
      ['populate', 0], ['populate', 2], ['populate', 4],
    ]);
    expect(plan.survey).toMatchObject({ met: 2 * CLUSTER, missing: 3 * CLUSTER, needed: CLUSTER });
  });

  test('has nothing to do where it has no backing file', () => {
    const plan = planFor({ backed: false }, {}, [UNALLOCATED, OWN_DATA, OWN_ZERO]);
    expect(plan).toMatchObject({ steps: [], passes: [], survey: { missing: 0, needed: 0 } });
  });

  test('is streamed where the backing file is to go, unless a route is forced', () => {
    expect(routesOf(planFor({}, { dropBacking: true }))).toEqual(['stream']);
    expect(routesOf(planFor({}, { dropBacking: true, route: 'populate' }))).toEqual(['populate', 'stream']);
    expect(routesOf(planFor({}, { route: 'stream' }))).toEqual(['stream']);
  });

  test('loses the link to its backing file also where nothing is left to copy', () => {
    const states = [OWN_DATA, OWN_ZERO];
    expect(planFor({}, { dropBacking: true }, states).passes).toMatchObject([{ route: 'stream', bytes: 0 }]);
    expect(routesOf(planFor({ backed: false }, { dropBacking: true }, states))).toEqual([]);
  });

  test('gets host blocks first, at falloc, of the whole image', () => {
    const plan = planFor({ unreserved: 7 * CLUSTER });
    expect(plan.passes).toMatchObject([{ route: 'reserve', bytes: 7 * CLUSTER }, { route: 'populate' }]);
    expect(plan.survey).toMatchObject({ unreserved: 7 * CLUSTER, needed: 7 * CLUSTER });
    expect(routesOf(planFor({ unreserved: 7 * CLUSTER }, { level: 'metadata' }))).toEqual(['populate']);
    expect(routesOf(planFor({ unreserved: 7 * CLUSTER }, { route: 'reserve' }))).toEqual(['reserve']);
    expect(routesOf(planFor({ unreserved: null }))).toEqual(['populate']);
  });

  test('can’t be written with zeros, nor by routes of files', () => {
    expect(codeOf(() => planFor({}, { level: 'full' }))).toBe('NEEDS_WINDOW');
    for (const route of ['fallocate', 'zero-write', 'unshare', 'device'] as const) {
      expect(codeOf(() => planFor({}, { route }))).toBe('USAGE');
    }
    for (const route of ['populate', 'stream', 'reserve'] as const) {
      expect(codeOf(() => planFor({ kind: 'file' }, { route }))).toBe('USAGE');
    }
  });
});

describe('extents of an NBD server', () => {
  test('have the layer that has the content, and whether it reads as zeros', () => {
    const [hole, zero] = [1, 2];
    const flags = [[0, hole | zero, 0, hole | zero, hole | zero], [1, 1, 2, 3, 0]];
    const page = {
      offset: Float64Array.from([0, 1, 2, 3, 4]), length: Float64Array.from([1, 1, 1, 1, 1]),
      flags: flags.map((list) => Uint32Array.from(list)),
    };
    const { state, depth } = extentsOf(page, 2);
    expect([...state]).toEqual([OWN_DATA, OWN_ZERO, BACKED_DATA, BACKED_ZERO, ABSENT]);
    expect([...depth!]).toEqual([0, 0, 1, 2, 2]);
    expect(extentsOf(page, 0).state[4]).toBe(UNALLOCATED);
  });
});
