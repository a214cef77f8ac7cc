import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { BadReply, PlainReply, ReadReply, StatusReply, type Reply } from '../../lib/nbd/replies.js';
import { ReplyParser } from '../../lib/nbd/reply-parser.js';
import { dataChunk, errorChunk, holeChunk, none, simple, statusChunk } from '../nbd/wire.js';

/** A parser of replies to requests 0, 1, … and what has become of them. */
function parserOf(replies: Reply<unknown>[]) {
  const done: number[] = [];
  const find = (generation: number, slot: number) => {
    const reply = generation === 5 && !done.includes(slot) ? replies[slot] : undefined;
    if (!reply) throw new BadReply('unknown');
    return reply;
  };
  return { done, parser: new ReplyParser({ find, done: (slot) => void done.push(slot) }, true) };
}

const cookie = (slot: number) => (5n << 32n) | BigInt(slot);

/** `whole` in pieces that end at the cuts. */
function pieces(whole: Buffer, cuts: number[]): Buffer[] {
  const places = [...new Set([0, ...cuts.map((cut) => cut % whole.length), whole.length])].sort((a, b) => a - b);
  // Copies: nothing may be read after `add`, as the buffer may be used again.
  return places.slice(1).map((end, i) => Buffer.from(whole.subarray(places[i], end)));
}

interface Part {
  length: number;
  hole: boolean;
}

const parts = fc.array(fc.record<Part>({ length: fc.integer({ min: 1, max: 700 }), hole: fc.boolean() }), { minLength: 1, maxLength: 20 });
const extents = fc.array(fc.tuple(fc.integer({ min: 1, max: 2 ** 20 }), fc.integer({ min: 0, max: 2 ** 32 - 1 })), { minLength: 1, maxLength: 50 });

describe('replies', () => {
  test('are put together, wherever bytes are cut and in whatever order chunks come', () => {
    fc.assert(
      fc.property(parts, extents, fc.infiniteStream(fc.nat(2 ** 20)), fc.array(fc.nat(20_000), { maxLength: 60 }), (list, found, order, cuts) => {
        const start = 123_456_789_012;
        const length = list.reduce((sum, part) => sum + part.length, 0);
        const expected = Buffer.from(Array.from({ length }, (_, i) => i & 0xff));
        const covered = found.reduce((sum, [bytes]) => sum + bytes, 0);
        const contexts = new Map([[3, 'a']]);
        const read = new ReadReply(start, length, true);
        const status = new StatusReply({ length: covered, reqOne: false, minimum: 1, contexts, hold: () => undefined });
        const failed = new PlainReply();
        const { parser, done } = parserOf([read, status, failed, new PlainReply()]);
        let at = 0;
        const chunks = list.map((part) => {
          const [from, to] = [at, (at += part.length)];
          if (part.hole) expected.fill(0, from, to);
          return part.hole
            ? holeChunk(false, cookie(0), start + from, part.length)
            : dataChunk(false, cookie(0), start + from, expected.subarray(from, to));
        });
        const others = [statusChunk(true, cookie(1), 3, found), errorChunk(true, cookie(2), 5, 'x'.repeat(300)), simple(0, cookie(3))];
        const keyed = [...chunks, ...others].map((bytes) => ({ bytes, key: order.next().value as number }));
        keyed.sort((a, b) => a.key - b.key);
        const stream = Buffer.concat([...keyed.map(({ bytes }) => bytes), none(cookie(0))]);
        for (const piece of pieces(stream, cuts)) {
          parser.add(piece);
          piece.fill(0xdb);
        }
        expect(done.sort()).toEqual([0, 1, 2, 3]);
        expect(read.result().equals(expected)).toBe(true);
        const [told] = status.result();
        expect([...told!.lengths]).toEqual(found.map(([bytes]) => bytes));
        expect([...told!.flags]).toEqual(found.map(([, flag]) => flag));
        expect(failed.error).toMatchObject({ errno: 5, message: 'x'.repeat(300) });
      }),
      { numRuns: 300 },
    );
  });

  test('of any bytes end with a BadReply or none, never with another error', () => {
    fc.assert(
      fc.property(fc.uint8Array({ maxLength: 300 }), fc.nat(3), (bytes, kind) => {
        const contexts = new Map([[3, 'a']]);
        const status = new StatusReply({ length: 4096, reqOne: false, minimum: 512, contexts, hold: () => undefined });
        const { parser } = parserOf([new ReadReply(0, 4096, true), status, new PlainReply()]);
        const heads = [none(cookie(0)), statusChunk(true, cookie(1), 3, []), errorChunk(true, cookie(2), 5), Buffer.alloc(0)];
        const head = heads[kind]!.subarray(0, 16);
        try {
          parser.add(Buffer.concat([head, bytes]));
        } catch (error) {
          expect(error).toBeInstanceOf(BadReply);
        }
      }),
      { numRuns: 1000 },
    );
  });

  test('to READ take memory when bytes come, not before', () => {
    const before = process.memoryUsage().arrayBuffers;
    const waiting = Array.from({ length: 1000 }, () => new ReadReply(0, 2 ** 25, true));
    expect(process.memoryUsage().arrayBuffers - before).toBeLessThan(2 ** 25);
    expect(waiting).toHaveLength(1000);
  });
});
