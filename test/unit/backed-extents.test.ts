import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ABSENT, BACKED_DATA, BACKED_ZERO, type ExtentPage } from '../../lib/extent.js';
import type { ExtentSource } from '../../lib/extent-source.js';
import { BELOW, COMPRESSED, PLAIN_ZEROS } from '../../lib/mapped.js';
import { BackedExtents } from '../../lib/qcow2/backed-extents.js';

type Run = [length: number, state: number];

/** The states byte by byte, of a range. */
function bytesOf(runs: Run[]): number[] {
  return runs.flatMap(([length, state]) => new Array<number>(length).fill(state));
}

/** Pages of `most` extents. */
function sourceOf(bytes: number[], most: number): ExtentSource {
  return {
    method: null,
    filesystem: null,
    file: null,
    async *pages({ offset, length }) {
      const found: [number, number, number][] = [];
      for (let at = offset; at < offset + length; at++) {
        const last = found.at(-1);
        if (last && last[2] === bytes[at]) last[1]++;
        else found.push([at, 1, bytes[at]!]);
      }
      for (let i = 0; i < found.length; i += most) yield pageOf(found.slice(i, i + most));
    },
    async [Symbol.asyncDispose]() {},
  };
}

function pageOf(extents: [number, number, number][]): ExtentPage {
  return {
    offset: Float64Array.from(extents, ([offset]) => offset),
    length: Float64Array.from(extents, ([, length]) => length),
    state: Uint8Array.from(extents, ([, , state]) => state),
    flags: new Uint32Array(extents.length),
    depth: Uint32Array.from(extents, ([, , state]) => (state === BACKED_DATA ? 1 : 0)),
    host: new Float64Array(extents.length).fill(-1),
  };
}

const runsOf = (states: number[]) =>
  fc.array(fc.tuple(fc.integer({ min: 1, max: 9 }), fc.constantFrom(...states)), { minLength: 1, maxLength: 20 });

describe('the map of an image and of what it lies on', () => {
  test('is the image’s own, but what lies below where the content comes from there', async () => {
    const own = runsOf([BELOW, PLAIN_ZEROS, COMPRESSED]);
    const below = runsOf([BACKED_DATA, BACKED_ZERO, ABSENT]);
    const pages = fc.integer({ min: 1, max: 5 });
    await fc.assert(
      fc.asyncProperty(own, below, pages, pages, async (ownRuns, belowRuns, mostOwn, mostBelow) => {
        const top = bytesOf(ownRuns);
        const bottom = [...bytesOf(belowRuns), ...new Array<number>(top.length).fill(ABSENT)];
        const joined = new BackedExtents(sourceOf(top, mostOwn), sourceOf(bottom, mostBelow));
        let next = 0;
        const told: number[] = [];
        for await (const page of joined.pages({ offset: 0, length: top.length })) {
          page.offset.forEach((offset, i) => {
            expect(offset).toBe(next);
            expect(page.length[i]).toBeGreaterThan(0);
            next += page.length[i]!;
            told.push(...new Array<number>(page.length[i]!).fill(page.state[i]!));
          });
        }
        expect(told).toEqual(top.map((state, at) => (state === BELOW ? bottom[at] : state)));
      }),
    );
  });
});
