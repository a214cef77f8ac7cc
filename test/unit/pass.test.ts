import fc from 'fast-check';
import { setImmediate as turn, setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, test } from 'vitest';
import { bytesOf, PassModel, UNIT, type ModelOptions } from './pass-model.js';

const options = fc.record({
  seed: fc.nat(),
  holes: fc.array(fc.boolean(), { maxLength: 120, size: 'max' }),
  depth: fc.integer({ min: 1, max: 4 }),
  units: fc.integer({ min: 1, max: 12 }),
  ranges: fc.integer({ min: 1, max: 6 }),
});
/** One hole of 40 units. */
const oneHole: ModelOptions = { seed: 1, holes: Array<boolean>(40).fill(true), depth: 1, units: 4, ranges: 4 };

function holeBytes({ holes }: ModelOptions): number {
  return holes.filter(Boolean).length * UNIT;
}

describe('a pass', () => {
  test('gives each wanted byte once, and no other', async () => {
    await fc.assert(
      fc.asyncProperty(options, async (given) => {
        const model = new PassModel(given);
        await model.run();
        expect(model.given).toEqual(given.holes.map(Number));
        expect(model.works.reduce((sum, { allocated }) => sum + allocated, 0)).toBe(holeBytes(given));
      }),
    );
  });

  test('keeps within the bounds of its chunks and of its depth', async () => {
    await fc.assert(
      fc.asyncProperty(options, async (given) => {
        const model = new PassModel(given);
        await model.run();
        expect(model.mostInFlight).toBeLessThanOrEqual(given.depth);
        for (const ranges of model.chunks) {
          expect(bytesOf(ranges)).toBeLessThanOrEqual(given.units * UNIT);
          expect(ranges.length / 2).toBeLessThanOrEqual(given.ranges);
          expect(bytesOf(ranges)).toBeGreaterThan(0);
        }
      }),
    );
  });

  test('keeps within the bounds that its session has found out', async () => {
    const model = new PassModel({ ...oneHole, sessionUnits: 2 });
    await model.run();
    expect(model.chunks.map(bytesOf)).toEqual(Array(20).fill(2 * UNIT));
  });

  test('has as many chunks in flight as its depth allows, where there are enough', async () => {
    const model = new PassModel({ ...oneHole, depth: 3, seed: 5 });
    await model.run();
    expect(model.mostInFlight).toBe(3);
  });

  test('goes in ascending order', async () => {
    await fc.assert(
      fc.asyncProperty(options, async (given) => {
        const model = new PassModel(given);
        await model.run();
        const starts = model.chunks.flat().filter((_, i) => i % 2 === 0);
        expect(starts).toEqual([...starts].sort((a, b) => a - b));
      }),
    );
  });

  test('cuts chunks to a twentieth of a second of the speed that is asked for', async () => {
    const model = new PassModel(oneHole);
    model.limits = { speed: 40 * UNIT, iops: Infinity };
    await model.run();
    expect(model.chunks.map(bytesOf)).toEqual(Array(20).fill(2 * UNIT));
  });

  test('syncs once and gives the session back', async () => {
    const model = new PassModel(oneHole);
    await model.run();
    expect([model.synced, model.disposed]).toEqual([1, 1]);
  });

  test('touches nothing outside of its range, whatever the extents say', async () => {
    const model = new PassModel(oneHole);
    await model.run({ range: { offset: 10 * UNIT, length: 5 * UNIT } });
    expect(model.given).toEqual(oneHole.holes.map((_, i) => Number(i >= 10 && i < 15)));
  });

  test('leaves a live image as much time between chunks as they take', async () => {
    const model = new PassModel(oneHole);
    model.live = true;
    let resting = 0;
    model.onChunk = () => void (resting = Math.max(resting, model.inFlight));
    await model.run();
    expect(resting).toBe(1);
    expect(model.given.every((times) => times === 1)).toBe(true);
  });
});

describe('space to keep free', () => {
  const room = fc.tuple(options, fc.integer({ min: 0, max: 60 }), fc.nat(UNIT - 1), fc.integer({ min: 1, max: 50 }));

  test('is never used, and what was done until then counts', async () => {
    await fc.assert(
      fc.asyncProperty(room, async ([given, units, rest, kept]) => {
        const keepFree = kept * UNIT;
        const model = new PassModel({ ...given, free: keepFree + units * UNIT + rest, keepFree });
        const error = await model.run().catch((failure: unknown) => failure);
        expect(model.free).toBeGreaterThanOrEqual(keepFree);
        const done = model.works.reduce((sum, { allocated }) => sum + allocated, 0);
        expect(done).toBe(model.given.filter(Boolean).length * UNIT);
        if (holeBytes(given) <= units * UNIT && given.depth === 1) expect(error).toBeUndefined();
        if (holeBytes(given) > units * UNIT) expect(error).toMatchObject({ code: 'KEEP_FREE' });
        expect(model.disposed).toBe(1);
      }),
    );
  });

  test('trims the last chunk, so that all the other space is used', async () => {
    await fc.assert(
      fc.asyncProperty(room, async ([given, units, rest, kept]) => {
        const keepFree = kept * UNIT;
        const model = new PassModel({ ...given, depth: 1, free: keepFree + units * UNIT + rest, keepFree });
        await model.run().catch(() => undefined);
        expect(model.given.filter(Boolean).length).toBe(Math.min(units, holeBytes(given) / UNIT));
      }),
    );
  });

  test('is not taken for used up by chunks in flight that have their blocks already', async () => {
    await fc.assert(
      fc.asyncProperty(room, async ([given, units, rest, kept]) => {
        const keepFree = kept * UNIT;
        const model = new PassModel({ ...given, free: keepFree + units * UNIT + rest, keepFree });
        await model.run().catch(() => undefined);
        expect(model.given.filter(Boolean).length).toBe(Math.min(units, holeBytes(given) / UNIT));
      }),
    );
  });

  test('says how much there was, and how much of it was to be kept', async () => {
    const model = new PassModel({ ...oneHole, free: 10 * UNIT, keepFree: 5 * UNIT });
    await expect(model.run()).rejects.toMatchObject({ code: 'KEEP_FREE', path: 'disk', available: 5 * UNIT });
  });
});

describe('a chunk that fails', () => {
  test('ends the pass after those in flight, and what it did counts', async () => {
    await fc.assert(
      fc.asyncProperty(options, fc.nat(8), async (given, failing) => {
        const model = new PassModel({ ...given, failing });
        const error = await model.run().catch((failure: unknown) => failure);
        expect(model.inFlight).toBe(0);
        expect(model.disposed).toBe(1);
        expect(model.works.length).toBe(model.chunks.length);
        if (model.chunks.length <= failing) return;
        expect(error).toMatchObject({ message: 'chunk failed' });
        expect(model.synced).toBe(0);
        expect(model.works.map(({ allocated }) => allocated)).toContain(Math.floor(bytesOf(model.chunks[failing]!) / 2));
      }),
    );
  });

  test('lets no other begin', async () => {
    await fc.assert(
      fc.asyncProperty(options, fc.nat(8), async (given, failing) => {
        const model = new PassModel({ ...given, failing });
        await model.run().catch(() => undefined);
        expect(model.startedAfterFailure).toBe(0);
      }),
    );
  });
});

describe('pause and cancel', () => {
  test('a pause holds the next chunk until it ends', async () => {
    const model = new PassModel(oneHole);
    let resume = () => {};
    const gate = new Promise<void>((resolve) => (resume = resolve));
    model.onChunk = () => {
      if (model.chunks.length === 3) model.unpaused = () => gate;
    };
    const running = model.run();
    await sleep(50);
    expect(model.chunks.length).toBe(3);
    expect(model.inFlight).toBe(0);
    resume();
    await running;
    expect(model.given.every((times) => times === 1)).toBe(true);
  });

  test('a cancel starts no other chunk, waits for those in flight, and syncs what they did', async () => {
    await fc.assert(
      fc.asyncProperty(options, fc.integer({ min: 1, max: 8 }), async (given, at) => {
        const model = new PassModel(given);
        model.onChunk = () => {
          if (model.chunks.length === at) model.controller.abort();
        };
        await model.run();
        expect(model.chunks.length).toBeLessThanOrEqual(at);
        expect(model.inFlight).toBe(0);
        expect([model.synced, model.disposed]).toEqual([1, 1]);
      }),
    );
  });

  test('a cancel ends a pause', async () => {
    const model = new PassModel(oneHole);
    model.unpaused = () => new Promise((resolve) => model.controller.signal.addEventListener('abort', () => resolve()));
    const running = model.run();
    await turn();
    model.controller.abort();
    await running;
    expect(model.chunks.length).toBe(0);
    expect(model.disposed).toBe(1);
  });
});

test('a route that can’t open ends the pass with its error', async () => {
  const model = new PassModel(oneHole);
  const route = { name: 'fallocate' as const, chunk: { bytes: UNIT, ranges: 1 }, most: { bytes: UNIT, ranges: 1 }, depth: 1, adapts: 'no' as const };
  const open = async () => {
    throw new Error('locked');
  };
  await expect(model.run({ route: { ...route, open } })).rejects.toThrow('locked');
});

test('extents that can’t be read end the pass after what is in flight', async () => {
  const model = new PassModel(oneHole);
  const next = async () => {
    await turn();
    throw new Error('unreadable');
  };
  const source = { pages: () => ({ next, [Symbol.asyncIterator]: () => ({ next }) }) };
  await expect(model.run({ source: source as never })).rejects.toThrow('unreadable');
  expect(model.disposed).toBe(1);
});
