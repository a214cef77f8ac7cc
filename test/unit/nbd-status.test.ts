import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { ContextStatus } from '../../lib/nbd/client.js';
import { joinContexts } from '../../lib/nbd/status-join.js';
import { statusPages, type StatusSource } from '../../lib/nbd/status-stream.js';

const UNIT = 4;

/** One number for each unit of an export, for each context. */
type Model = number[][];

function statusOf(context: string, flags: number[], splits: boolean): ContextStatus {
  const lengths: number[] = [];
  const kept: number[] = [];
  for (const flag of flags) {
    if (kept.at(-1) === flag && !splits) lengths[lengths.length - 1]! += UNIT;
    else {
      kept.push(flag);
      lengths.push(UNIT);
    }
  }
  return { context, length: flags.length * UNIT, lengths: Uint32Array.from(lengths), flags: Uint32Array.from(kept) };
}

/** A server that answers as much as `amounts` says, each context differently, and late. */
function sourceOf(model: Model, amounts: number[], size: number): StatusSource & { asked: number } {
  let turn = 0;
  const source = {
    asked: 0,
    size,
    path: 'a model',
    blockSize: { minimum: UNIT, preferred: UNIT, maximum: UNIT },
    contexts: model.map((_, i) => `c${i}`),
    blockStatus: async (offset: number, length: number) => {
      source.asked++;
      expect(offset % UNIT).toBe(0);
      const first = offset / UNIT;
      const most = Math.ceil(length / UNIT);
      const answers = model.map((flags, i) => {
        const count = 1 + (amounts[turn++ % amounts.length]! % most);
        return statusOf(`c${i}`, flags.slice(first, first + count), turn % 3 === 0);
      });
      for (let i = turn % 4; i > 0; i--) await Promise.resolve();
      return answers;
    },
  };
  return source;
}

const models = fc.integer({ min: 1, max: 3 }).chain((contexts) =>
  fc.array(fc.array(fc.nat(2), { minLength: contexts, maxLength: contexts }), { minLength: 1, maxLength: 120 }),
);

describe('pages of status', () => {
  test('tell each byte as the server does, in extents as large as can be', async () => {
    await fc.assert(
      fc.asyncProperty(models, fc.array(fc.nat(200), { minLength: 1 }), fc.nat(480), fc.nat(480), fc.integer({ min: 1, max: 5 }), fc.integer({ min: 1, max: 100 }), async (rows, amounts, a, b, lanes, step) => {
        const model = rows[0]!.map((_, context) => rows.map((row) => row[context]!));
        const size = rows.length * UNIT;
        const [start, end] = [a % size, b % (size + 1)].sort((x, y) => x - y) as [number, number];
        const source = sourceOf(model, amounts, size);
        const picks = model.map((_, i) => i).reverse();
        let at = start;
        let last: string | undefined;
        for await (const page of statusPages(source, { offset: start, length: end - start }, { lanes, step, contexts: picks.map((i) => `c${i}`) })) {
          expect(page.length.length).toBeGreaterThan(0);
          page.offset.forEach((offset, i) => {
            expect(offset).toBe(at);
            at += page.length[i]!;
            const key = page.flags.map((flags) => flags[i]).join();
            expect(key).not.toBe(last);
            last = key;
            for (let byte = offset; byte < at; byte++) {
              expect(key).toBe(picks.map((pick) => model[pick]![Math.floor(byte / UNIT)]).join());
            }
          });
        }
        expect(at).toBe(end);
      }),
      { numRuns: 500 },
    );
  });

  test('fail as the server does, after what came before', async () => {
    const source = sourceOf([Array.from({ length: 100 }, (_, i) => i)], [9], 400);
    const { blockStatus } = source;
    source.blockStatus = (offset, length) => (offset < 200 ? blockStatus(offset, length) : Promise.reject(new Error('lost')));
    let end = 0;
    const reading = async () => {
      for await (const page of statusPages(source, { offset: 0, length: 400 }, { step: 40 })) {
        end = page.offset.at(-1)! + page.length.at(-1)!;
      }
    };
    await expect(reading()).rejects.toThrow('lost');
    expect(end).toBeGreaterThan(0);
    expect(end).toBeLessThanOrEqual(200);
  });
});

test('contexts are joined as far as all of them tell', () => {
  const page = joinContexts(
    [statusOf('a', [1, 1, 2, 2], false), statusOf('b', [5, 6, 6], false)],
    1000,
  );
  expect(page.covered).toBe(12);
  expect([...page.offset]).toEqual([1000, 1004, 1008]);
  expect([...page.length]).toEqual([4, 4, 4]);
  expect(page.flags.map((flags) => [...flags])).toEqual([[1, 1, 2], [5, 6, 6]]);
});
