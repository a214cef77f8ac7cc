import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { BASE_ALLOCATION } from '../../lib/nbd/client.js';
import { STATE_ZERO } from '../../lib/nbd/protocol.js';
import type { StatusSource } from '../../lib/nbd/status-stream.js';
import { ZeroParts } from '../../lib/routes/zero-parts.js';

const KIB = 2 ** 10;
const MIB = 2 ** 20;
const UNIT = 16 * KIB;
const WINDOW = 64 * MIB;

interface Run {
  units: number;
  zero: boolean;
}

const endsOf = (runs: Run[]) => runs.map((_, i) => runs.slice(0, i + 1).reduce((sum, { units }) => sum + units * UNIT, 0));

/** An export of runs of zeros and content. */
function sourceOf(runs: Run[]): StatusSource & { asked: [number, number][] } {
  const ends = endsOf(runs);
  const source = {
    asked: [] as [number, number][],
    size: ends.at(-1)!,
    path: 'a model',
    blockSize: { minimum: 1, preferred: 4096, maximum: 32 * MIB },
    contexts: [BASE_ALLOCATION],
    blockStatus: (offset: number, length: number) => {
      source.asked.push([offset, length]);
      const lengths: number[] = [];
      const flags: number[] = [];
      let at = offset;
      ends.forEach((end, i) => {
        const part = Math.min(end, offset + length) - at;
        if (part <= 0) return;
        lengths.push(part);
        flags.push(runs[i]!.zero ? STATE_ZERO : 0);
        at += part;
      });
      return Promise.resolve([
        { context: BASE_ALLOCATION, length, lengths: Uint32Array.from(lengths), flags: Uint32Array.from(flags) },
      ]);
    },
  };
  return source;
}

const whole = ({ size }: { size: number }) => ({ offset: 0, length: size });

/** Whether each cluster of a range has content. */
function contentOf(runs: Run[], cluster: number, offset: number, end: number): boolean[] {
  const ends = endsOf(runs);
  const clusters: boolean[] = [];
  for (let at = offset; at < end; at += cluster) {
    clusters.push(runs.some(({ zero }, i) => !zero && (ends[i - 1] ?? 0) < at + cluster && ends[i]! > at));
  }
  return clusters;
}

const disk = fc.array(
  fc.record({ units: fc.oneof(fc.integer({ min: 1, max: 40 }), fc.integer({ min: 1, max: 5000 })), zero: fc.boolean() }),
  { minLength: 1, maxLength: 12 },
);

describe('where zeros begin and end', () => {
  test('is found in whole clusters, for ranges of any size in any order', () =>
    fc.assert(
      fc.asyncProperty(disk, fc.constantFrom(64 * KIB, 2 * MIB), fc.array(fc.tuple(fc.nat(), fc.nat()), { minLength: 1, maxLength: 8 }), async (runs, cluster, asked) => {
        const source = sourceOf(runs);
        const zeroParts = new ZeroParts(source, cluster, whole(source));
        const clusters = Math.ceil(source.size / cluster);
        for (const [a, b] of asked) {
          const first = a % clusters;
          const offset = first * cluster;
          const end = Math.min(source.size, (first + 1 + (b % (clusters - first))) * cluster);
          const told: boolean[] = [];
          let at = offset;
          for (const part of await zeroParts.partsOf({ offset, length: end - offset })) {
            expect(part.offset).toBe(at);
            expect(part.length).toBeGreaterThan(0);
            at += part.length;
            const content = contentOf(runs, cluster, part.offset, at);
            expect(new Set(content).size).toBe(1);
            told.push(...content);
          }
          expect(at).toBe(end);
          expect(told).toEqual(contentOf(runs, cluster, offset, end));
        }
      }),
      { numRuns: 300 },
    ));

  test('is asked for once a window where a disk is copied in sequence, and of no more than a small range', async () => {
    const size = 3 * WINDOW + 5 * MIB;
    const source = sourceOf([{ units: size / UNIT, zero: false }]);
    const zeroParts = new ZeroParts(source, 64 * KIB, whole(source));
    const chunks = Array.from({ length: Math.ceil(size / (4 * MIB)) }, (_, i) => 4 * MIB * i);
    for (let i = 0; i < chunks.length; i += 8) {
      const together = chunks.slice(i, i + 8);
      await Promise.all(together.map((offset) => zeroParts.partsOf({ offset, length: Math.min(4 * MIB, size - offset) })));
    }
    expect(source.asked).toEqual([[0, WINDOW], [WINDOW, WINDOW], [2 * WINDOW, WINDOW], [3 * WINDOW, 5 * MIB]]);
    await zeroParts.partsOf({ offset: WINDOW, length: 64 * KIB });
    expect(source.asked.at(-1)).toEqual([WINDOW, 64 * KIB]);
  });

  test('is asked of nothing outside of the clusters of the request', async () => {
    const source = sourceOf([{ units: (3 * WINDOW) / UNIT, zero: false }]);
    const request = { offset: 10 * MIB + 5, length: WINDOW };
    const zeroParts = new ZeroParts(source, 64 * KIB, request);
    for (let at = 10 * MIB; at < 74 * MIB; at += 4 * MIB) await zeroParts.partsOf({ offset: at, length: 4 * MIB });
    expect(source.asked).toEqual([[10 * MIB, WINDOW - 10 * MIB], [WINDOW, 10 * MIB + 64 * KIB]]);
  });

  test('is asked for again after it could not be told', async () => {
    const source = sourceOf([{ units: 1000, zero: false }]);
    const { blockStatus } = source;
    source.blockStatus = () => Promise.reject(new Error('lost'));
    const zeroParts = new ZeroParts(source, 64 * KIB, whole(source));
    const range = { offset: 0, length: 4 * MIB };
    await expect(zeroParts.partsOf(range)).rejects.toThrow('lost');
    source.blockStatus = blockStatus;
    expect(await zeroParts.partsOf(range)).toEqual([range]);
  });
});
