import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { alignPages } from '../../lib/align.js';
import { EXTENT_FLAGS, HOLE, SHARED, UNKNOWN, UNWRITTEN, WRITTEN, type ExtentPage } from '../../lib/extent.js';
import type { ByteRange } from '../../lib/types.js';
import { pageOf, type Piece } from './pages.js';

/** From the least allocated to the most. */
const RANKED = [HOLE, UNWRITTEN, UNKNOWN, SHARED, WRITTEN];

async function align(pages: ExtentPage[], unit: number, range: ByteRange): Promise<Piece[]> {
  const pieces: Piece[] = [];
  for await (const page of alignPages(streamOf(pages), unit, range)) {
    expect(page.offset.length).toBeGreaterThan(0);
    page.state.forEach((state, i) => {
      pieces.push({ offset: page.offset[i]!, length: page.length[i]!, state, flags: page.flags[i]! });
    });
  }
  return pieces;
}

async function* streamOf(pages: ExtentPage[]): AsyncGenerator<ExtentPage> {
  yield* pages;
}

/** Extents one after the other from `offset`. */
function placed(offset: number, parts: [length: number, state: number, flags?: number][]): Piece[] {
  let at = offset;
  return parts.map(([length, state, flags = 0]) => {
    at += length;
    return { offset: at - length, length, state, flags };
  });
}

function bytesOf(pieces: Piece[], range: ByteRange): number[] {
  const bytes = new Array<number>(range.length).fill(-1);
  for (const { offset, length, state } of pieces) bytes.fill(state, offset - range.offset, offset - range.offset + length);
  return bytes;
}

/** Byte by byte: the least allocated state of the unit that it lies in. */
function model(pieces: Piece[], unit: number, range: ByteRange): number[] {
  const from = pieces[0]!.offset;
  const last = pieces.at(-1)!;
  const all = bytesOf(pieces, { offset: from, length: last.offset + last.length - from });
  return Array.from({ length: range.length }, (_, i) => {
    const first = Math.floor((range.offset + i) / unit) * unit - from;
    const states = all.slice(Math.max(0, first), first + unit);
    return RANKED.find((state) => states.includes(state))!;
  });
}

const whole = (pieces: Piece[]): ByteRange => {
  const last = pieces.at(-1)!;
  return { offset: pieces[0]!.offset, length: last.offset + last.length - pieces[0]!.offset };
};

describe('alignPages', () => {
  test('leaves aligned extents as they are', async () => {
    const pieces = placed(0, [[4096, WRITTEN], [8192, HOLE], [4096, UNWRITTEN, EXTENT_FLAGS.unwritten]]);
    expect(await align([pageOf(pieces)], 4096, whole(pieces))).toEqual(pieces);
  });

  test('gives nothing for nothing', async () => {
    expect(await align([], 4096, { offset: 8192, length: 0 })).toEqual([]);
  });

  test.each([
    [WRITTEN, HOLE, HOLE],
    [UNWRITTEN, HOLE, HOLE],
    [UNWRITTEN, UNKNOWN, UNWRITTEN],
    [WRITTEN, UNKNOWN, UNKNOWN],
    [SHARED, UNKNOWN, UNKNOWN],
    [WRITTEN, SHARED, SHARED],
  ])('takes a unit of states %d and %d for %d, in whatever order', async (a, b, least) => {
    for (const [first, second] of [[a, b], [b, a]] as const) {
      const pieces = placed(0, [[100, first], [412, second]]);
      expect(await align([pageOf(pieces)], 512, whole(pieces))).toEqual([
        { offset: 0, length: 512, state: least, flags: 0 },
      ]);
    }
  });

  test('keeps the flags of the state that a unit takes', async () => {
    const pieces = placed(0, [[100, WRITTEN, 1], [100, UNKNOWN, EXTENT_FLAGS.delalloc], [824, WRITTEN, 2]]);
    expect(await align([pageOf(pieces)], 512, whole(pieces))).toEqual([
      { offset: 0, length: 512, state: UNKNOWN, flags: EXTENT_FLAGS.delalloc },
      { offset: 512, length: 512, state: WRITTEN, flags: 2 },
    ]);
  });

  test('judges a unit by all of it, where the range ends inside', async () => {
    const pieces = placed(0, [[600, WRITTEN], [424, HOLE]]);
    expect(await align([pageOf(pieces)], 512, { offset: 500, length: 50 })).toEqual([
      { offset: 500, length: 12, state: WRITTEN, flags: 0 },
      { offset: 512, length: 38, state: HOLE, flags: 0 },
    ]);
  });

  const states = fc.constantFrom(...RANKED);
  const extents = fc.array(fc.tuple(fc.integer({ min: 1, max: 40 }), states), { minLength: 1, maxLength: 30 });

  test('agrees with a model of bytes, however the extents come in pages', async () => {
    const property = fc.asyncProperty(
      extents,
      fc.integer({ min: 1, max: 16 }),
      fc.nat(5),
      fc.integer({ min: 1, max: 7 }),
      fc.nat(100),
      fc.nat(300),
      async (parts, unit, units, perPage, skip, most) => {
        const pieces = placed(units * unit, parts);
        const all = whole(pieces);
        const offset = all.offset + (skip % all.length);
        const range = { offset, length: Math.min(most, all.offset + all.length - offset) };
        const pages = [];
        for (let i = 0; i < pieces.length; i += perPage) pages.push(pageOf(pieces.slice(i, i + perPage)));
        const aligned = await align(pages, unit, range);
        expect(bytesOf(aligned, range)).toEqual(model(pieces, unit, range));
        expectAligned(aligned, unit, range);
        const joined = aligned.filter((piece, i) => piece.state === aligned[i - 1]?.state);
        expect(joined).toEqual([]);
      },
    );
    await fc.assert(property, { numRuns: 500 });
  });

  function expectAligned(pieces: Piece[], unit: number, range: ByteRange): void {
    let end = range.offset;
    for (const { offset, length } of pieces) {
      expect(offset).toBe(end);
      expect(length).toBeGreaterThan(0);
      if (offset !== range.offset) expect(offset % unit).toBe(0);
      end += length;
    }
    expect(end).toBe(range.offset + range.length);
  }
});
