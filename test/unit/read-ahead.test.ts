import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import type { ExtentPage } from '../../lib/extent.js';
import { readAhead, type ReadPage } from '../../lib/read-ahead.js';

const MIB = 2 ** 20;

interface Piece {
  offset: number;
  length: number;
  state: number;
}

/** A disk of extents, none of them like its neighbour. */
const disk: fc.Arbitrary<Piece[]> = fc
  .array(fc.record({ length: fc.integer({ min: 1, max: 3 * MIB }), state: fc.nat(4) }), { maxLength: 80 })
  .map((parts) => {
    const pieces: Piece[] = [];
    for (const { length, state } of parts) {
      const last = pieces[pieces.length - 1];
      const offset = last ? last.offset + last.length : 0;
      if (last?.state === state) last.length += length;
      else pieces.push({ offset, length, state });
    }
    return pieces;
  });

function pageOf(pieces: Piece[], next: number): ReadPage {
  return {
    offset: Float64Array.from(pieces, (piece) => piece.offset),
    length: Float64Array.from(pieces, (piece) => piece.length),
    state: Uint8Array.from(pieces, (piece) => piece.state),
    flags: Uint32Array.from(pieces, () => 0),
    next,
  };
}

/** What the addon does: clips to what was asked for, and ends before an extent that may go on. */
function readFrom(pieces: Piece[], offset: number, end: number, most: number): ReadPage {
  const found = pieces
    .map((piece) => {
      const from = Math.max(piece.offset, offset);
      return { ...piece, offset: from, length: Math.min(piece.offset + piece.length, end) - from };
    })
    .filter((piece) => piece.length > 0);
  const next = found.length > most ? found[most]!.offset : end;
  return pageOf(found.slice(0, most), next);
}

async function collect(pages: AsyncIterable<ExtentPage>): Promise<Piece[]> {
  const pieces: Piece[] = [];
  for await (const page of pages) {
    expect(page.state.length).toBeGreaterThan(0);
    page.state.forEach((state, i) =>
      pieces.push({ offset: page.offset[i]!, length: page.length[i]!, state }),
    );
  }
  return pieces;
}

const endOfDisk = (pieces: Piece[]) => pieces.reduce((sum, { length }) => sum + length, 0);

describe('readAhead', () => {
  test('gives just what one large read gives, however it is cut, and in whatever order it comes', () =>
    fc.assert(
      fc.asyncProperty(
        disk,
        fc.integer({ min: 1, max: 9 }),
        fc.integer({ min: 1, max: 5 }),
        fc.scheduler(),
        async (pieces, most, lanes, scheduler) => {
          const read = scheduler.scheduleFunction((offset: number, end: number) =>
            Promise.resolve(readFrom(pieces, offset, end, most)),
          );
          const all = collect(readAhead({ offset: 0, length: endOfDisk(pieces) }, lanes, read));
          await scheduler.waitFor(all.then(() => undefined));
          expect(await all).toEqual(pieces);
        },
      ),
    ));

  test('never has more reads under way than lanes', async () => {
    const pieces = Array.from({ length: 3000 }, (_, i) => ({ offset: i * MIB, length: MIB, state: i % 2 }));
    let running = 0;
    let most = 0;
    const read = async (offset: number, end: number) => {
      most = Math.max(most, ++running);
      await new Promise((resolve) => setImmediate(resolve));
      running--;
      return readFrom(pieces, offset, end, 16);
    };
    expect(await collect(readAhead({ offset: 0, length: 3000 * MIB }, 3, read))).toEqual(pieces);
    expect(most).toBe(3);
  });

  test('reads several at a time again where a dense part follows a sparse one', async () => {
    const [block, most] = [4096, 4096];
    const hole = { from: 64 * MIB, to: 4096 * MIB };
    const end = hole.to + 512 * MIB;
    const extentFrom = (offset: number) =>
      offset >= hole.from && offset < hole.to
        ? { offset, length: hole.to - offset, state: 0 }
        : { offset, length: block, state: 1 + ((offset / block) % 2) };
    let [inTurn, reads] = [0, 0];
    const read = async (offset: number, to: number) => {
      reads++;
      const turn = inTurn + 1;
      await new Promise((resolve) => setImmediate(resolve));
      inTurn = Math.max(inTurn, turn);
      const extents: Piece[] = [];
      for (let at = offset; at < to && extents.length < most; at += extents.at(-1)!.length) {
        const extent = extentFrom(at);
        extents.push({ ...extent, length: Math.min(extent.length, to - at) });
      }
      const last = extents.at(-1)!;
      return pageOf(extents, last.offset + last.length);
    };
    let extents = 0;
    for await (const page of readAhead({ offset: 0, length: end }, 4, read)) extents += page.state.length;
    expect(extents).toBe((hole.from + end - hole.to) / block + 1);
    expect(reads).toBeLessThan(70);
    expect(inTurn).toBeLessThan(reads / 3);
  });

  test('ends where a cancelled read brings nothing', async () => {
    const pieces = [{ offset: 0, length: MIB, state: 0 }, { offset: MIB, length: MIB, state: 2 }];
    let reads = 0;
    const read = (offset: number, end: number) =>
      Promise.resolve(reads++ === 0 ? readFrom(pieces, offset, end, 1) : pageOf([], offset));
    expect(await collect(readAhead({ offset: 0, length: 2 * MIB }, 2, read))).toEqual([pieces[0]]);
  });

  test('passes the error of a read on, and of the first that fails in order', async () => {
    const read = (offset: number) =>
      offset === 0
        ? Promise.resolve(pageOf([{ offset: 0, length: MIB, state: 0 }], MIB))
        : Promise.reject(new Error(`at ${offset}`));
    await expect(collect(readAhead({ offset: 0, length: 9 * MIB }, 4, read))).rejects.toThrow(`at ${MIB}`);
  });

  test('reads nothing for nothing', async () => {
    const read = () => Promise.reject(new Error('read'));
    expect(await collect(readAhead({ offset: 5, length: 0 }, 4, read))).toEqual([]);
  });
});
