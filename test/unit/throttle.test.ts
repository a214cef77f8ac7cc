import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { systemClock, Throttle } from '../../lib/throttle.js';
import { random } from '../support/patterns.js';
import { VirtualClock } from './virtual-clock.js';

const never = new AbortController().signal;
/** Seconds' worth that may be saved up to make good for late timers. */
const SAVED = 0.02;
/** How much faster than the rate it may go to catch up, and with how many seconds' worth. */
const CATCH_UP = 0.25;
const BEHIND = 1;

interface Grant {
  at: number;
  amount: number;
}
type Speeds = { at: number; rate: number }[];

const rate = fc.integer({ min: 1, max: 1_000_000 });
const scenario = fc.record({
  first: rate,
  changes: fc.array(fc.record({ at: fc.nat(20_000), rate }), { maxLength: 6, size: 'max' }),
  requests: fc.array(fc.record({ idle: fc.nat(500), amount: fc.integer({ min: 1, max: 100_000 }) }), {
    minLength: 1,
    maxLength: 40,
  }),
  lateness: fc.nat(3),
});
/** The second request goes too early if a change forgives a debt. */
const lowered = {
  first: 2,
  changes: [{ at: 1, rate: 1 }],
  requests: [{ idle: 0, amount: 1 }, { idle: 0, amount: 1 }],
  lateness: 0,
};
type Scenario = typeof scenario extends fc.Arbitrary<infer T> ? T : never;

/** Runs one request after the other; `unit` says what is limited. */
async function simulate({ first, changes, requests, lateness }: Scenario, unit: 'bytes' | 'requests') {
  const clock = new VirtualClock(() => lateness);
  const throttle = unit === 'bytes' ? new Throttle(first, Infinity, clock) : new Throttle(Infinity, first, clock);
  const speeds: Speeds = [{ at: 0, rate: first }];
  for (const change of [...changes].sort((a, b) => a.at - b.at)) {
    clock.schedule(change.at, () => {
      speeds.push({ at: clock.now(), rate: change.rate });
      if (unit === 'bytes') throttle.setSpeed(change.rate);
      else throttle.setIops(change.rate);
    });
  }
  const grants: Grant[] = [];
  for (const { idle, amount } of requests) {
    await clock.pass(idle);
    await throttle.take(unit === 'bytes' ? amount : 1, unit === 'bytes' ? 1 : amount, never);
    grants.push({ at: clock.now(), amount });
  }
  return { grants, speeds };
}

/** The most that may pass between two moments, without the one request that may go into debt. */
function allowed(speeds: Speeds, from: number, to: number): number {
  let sum = 0;
  let highest = 0;
  speeds.forEach(({ at, rate: speed }, i) => {
    const end = Math.min(to, speeds[i + 1]?.at ?? Infinity);
    if (end < from || at > to) return;
    const seconds = Math.max(0, end - Math.max(from, at)) / 1000;
    sum += speed * Math.min(seconds * (1 + CATCH_UP), seconds + BEHIND);
    highest = Math.max(highest, speed);
  });
  return sum + highest * SAVED;
}

function expectWithinBounds(grants: Grant[], speeds: Speeds): void {
  grants.forEach((from, i) => {
    let passed = 0;
    let largest = 0;
    for (const to of grants.slice(i)) {
      passed += to.amount;
      largest = Math.max(largest, to.amount);
      const bound = allowed(speeds, from.at, to.at) + largest;
      expect(passed).toBeLessThanOrEqual(bound * (1 + 1e-9) + 1e-6);
    }
  });
}

describe('in any window, no more passes than the rate allows, one request, and what is saved up', () => {
  test.each(['bytes', 'requests'] as const)('of %s, at a steady rate', async (unit) => {
    await fc.assert(
      fc.asyncProperty(scenario, async (given) => {
        const { grants, speeds } = await simulate({ ...given, changes: [] }, unit);
        expectWithinBounds(grants, speeds);
      }),
    );
  });

  test.each(['bytes', 'requests'] as const)('of %s, whatever changes meanwhile', async (unit) => {
    await fc.assert(
      fc.asyncProperty(scenario, async (given) => {
        const { grants, speeds } = await simulate(given, unit);
        expectWithinBounds(grants, speeds);
      }),
      { examples: [[lowered]] },
    );
  });
});

describe('over a long run', () => {
  async function averageOf(limit: number, late: () => number, unit: 'bytes' | 'requests'): Promise<number> {
    const clock = new VirtualClock(late);
    const throttle = unit === 'bytes' ? new Throttle(limit, Infinity, clock) : new Throttle(Infinity, limit, clock);
    const next = random(7);
    let passed = 0;
    while (clock.now() < 200_000) {
      const amount = 1 + (next() % Math.ceil(limit / 10));
      await throttle.take(unit === 'bytes' ? amount : 1, unit === 'bytes' ? 1 : amount, never);
      passed += amount;
    }
    return (passed / clock.now()) * 1000;
  }

  test.each(['bytes', 'requests'] as const)('the average of %s is the rate, within 1%%', async (unit) => {
    for (const limit of [100, 5000, 50 * 2 ** 20]) {
      const average = await averageOf(limit, () => 0, unit);
      expect(Math.abs(average / limit - 1)).toBeLessThan(0.01);
    }
  });

  test.each(['bytes', 'requests'] as const)('late timers do not lower the average of %s', async (unit) => {
    const next = random(11);
    for (const limit of [5000, 50 * 2 ** 20]) {
      const average = await averageOf(limit, () => (next() % 3001) / 1000, unit);
      expect(Math.abs(average / limit - 1)).toBeLessThan(0.02);
    }
  });

  test('a disk that stalls makes the average no lower', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(5000, Infinity, clock);
    let passed = 0;
    for (let i = 0; clock.now() < 100_000; i++) {
      await throttle.take(100, 1, never);
      passed += 100;
      if (i % 200 === 199) await clock.pass(600);
    }
    expect(Math.abs(passed / clock.now() / 5 - 1)).toBeLessThan(0.02);
  });

  test('a pause is not caught up with', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(1000, Infinity, clock);
    await throttle.take(1, 1, never);
    await clock.pass(10_000);
    throttle.forgive();
    const resumed = clock.now();
    for (let i = 0; i < 50; i++) await throttle.take(100, 1, never);
    expect(5000 / (clock.now() - resumed)).toBeLessThan(1.05);
  });

  test('the tighter one of two limits rules', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(1000, 10, clock);
    for (let i = 0; i < 1000; i++) await throttle.take(10, 1, never);
    expect(clock.now() / 1000).toBeCloseTo(1000 / 10, -1);
  });
});

describe('a waiting request', () => {
  test('goes at once when the speed is made boundless', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(1, Infinity, clock);
    await throttle.take(1_000_000, 1, never);
    clock.schedule(500, () => throttle.setSpeed(Infinity));
    await throttle.take(1, 1, never);
    expect(clock.now()).toBe(500);
  });

  test.each(['setSpeed', 'setIops'] as const)('waits only as long as the rate that %s gives it asks for', async (set) => {
    const clock = new VirtualClock();
    const throttle = set === 'setSpeed' ? new Throttle(1, Infinity, clock) : new Throttle(Infinity, 1, clock);
    await throttle.take(1000, 1000, never);
    clock.schedule(500, () => throttle[set](100_000));
    await throttle.take(1, 1, never);
    expect(clock.now()).toBeGreaterThanOrEqual(500);
    expect(clock.now()).toBeLessThan(500 + 11);
  });

  test('goes at once, having taken nothing, when its signal aborts', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(1000, Infinity, clock);
    await throttle.take(10_000, 1, never);
    const controller = new AbortController();
    clock.schedule(500, () => controller.abort());
    await throttle.take(1_000_000, 1, controller.signal);
    expect(clock.now()).toBe(500);
    await throttle.take(1, 1, never);
    expect(clock.now()).toBeCloseTo(10_000, 6);
  });

  test('does not begin to wait when its signal has aborted already', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(1, 1, clock);
    await throttle.take(100, 100, never);
    await throttle.take(100, 100, AbortSignal.abort());
    expect(clock.now()).toBe(0);
  });

  test('keeps its place: requests go in the order of their calls', async () => {
    const order = fc.array(fc.integer({ min: 1, max: 1000 }), { maxLength: 20, size: 'max' });
    await fc.assert(
      fc.asyncProperty(order, async (amounts) => {
        const throttle = new Throttle(100, 3, new VirtualClock());
        const gone: number[] = [];
        await Promise.all(amounts.map((amount, i) => throttle.take(amount, 1, never).then(() => gone.push(i))));
        expect(gone).toEqual(amounts.map((_, i) => i));
      }),
    );
  });

  test('lets those behind it go when it is aborted', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(1000, Infinity, clock);
    await throttle.take(1000, 1, never);
    const controller = new AbortController();
    clock.schedule(100, () => controller.abort());
    const gone: string[] = [];
    await Promise.all([
      throttle.take(1_000_000, 1, controller.signal).then(() => gone.push('aborted')),
      throttle.take(1, 1, never).then(() => gone.push('behind')),
    ]);
    expect(gone).toEqual(['aborted', 'behind']);
    expect(clock.now()).toBeCloseTo(1000, 6);
  });
});

describe('without a limit', () => {
  test('nothing waits', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(Infinity, Infinity, clock);
    for (let i = 0; i < 1000; i++) await throttle.take(2 ** 40, 1000, never);
    expect(clock.now()).toBe(0);
  });

  test('what passed leaves no debt to a limit that is set later', async () => {
    const clock = new VirtualClock();
    const throttle = new Throttle(Infinity, Infinity, clock);
    await throttle.take(2 ** 40, 1000, never);
    throttle.setSpeed(1);
    await throttle.take(1, 1, never);
    expect(clock.now()).toBe(0);
  });
});

describe('the clock of the system', () => {
  test('sleeps, and wakes when the signal aborts', async () => {
    const began = performance.now();
    await systemClock.sleep(20, never);
    expect(performance.now() - began).toBeGreaterThan(15);
    await systemClock.sleep(60_000, AbortSignal.timeout(20));
    expect(performance.now() - began).toBeLessThan(10_000);
  });

  test('leaves no listener on the signal', async () => {
    const { signal } = new AbortController();
    let listeners = 0;
    signal.addEventListener = () => void listeners++;
    signal.removeEventListener = () => void listeners--;
    await systemClock.sleep(1, signal);
    expect(listeners).toBe(0);
  });

  test('does not wake early from a sleep of weeks', async () => {
    const controller = new AbortController();
    let woken = false;
    const sleeping = systemClock.sleep(2 ** 31, controller.signal).then(() => (woken = true));
    await systemClock.sleep(50, never);
    expect(woken).toBe(false);
    controller.abort();
    await sleeping;
  });
});
