import fc from 'fast-check';
import { describe, expect, test, vi } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { NbdClient, type ConnectOptions } from '../../lib/nbd/client.js';
import { waitFor } from '../support/wait.js';
import {
  ack,
  chunk,
  dataChunk,
  errorChunk,
  fakeServer,
  hello,
  holeChunk,
  infoBlockSize,
  infoExport,
  none,
  simple,
  SIZE,
  statusChunk,
  u32,
  u64,
  type Peer,
  type WireRequest,
} from './wire.js';

const CONTEXTS = ['base:allocation', 'qemu:allocation-depth'];
const KiB = 1024;

interface Answering extends ConnectOptions {
  structured?: boolean;
}

/** A client of a server that answers the requests as `answer` says, and the server's end. */
async function clientOf(
  answer: (request: WireRequest, peer: Peer) => void | Promise<void>,
  { structured = true, ...options }: Answering = {},
): Promise<NbdClient & AsyncDisposable> {
  const fake = await fakeServer(async (peer) => {
    await peer.handshake(structured);
    for (;;) {
      const request = await peer.request();
      if (request.command === 1) await peer.inbox.take(request.length);
      if (request.command === 2) return void peer.socket.end();
      await answer(request, peer);
    }
  });
  return NbdClient.connect(fake, { metaContexts: CONTEXTS, ...options });
}

const codeOf = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => 'resolved',
    (error: unknown) => (error instanceof ThickenError ? error.code : `not ours: ${String(error)}`),
  );

const bytes = (length: number, value = 0xee) => Buffer.alloc(length, value);
const OFFSET = 8 * KiB;
const LENGTH = 4 * KiB;

describe('a reply to READ', () => {
  test.each<[string, (cookie: bigint) => Buffer[]]>([
    ['one chunk', (c) => [dataChunk(true, c, OFFSET, bytes(LENGTH))]],
    ['an end by itself', (c) => [dataChunk(false, c, OFFSET, bytes(LENGTH)), none(c)]],
    ['pieces out of order', (c) => [
      dataChunk(false, c, OFFSET + 3000, bytes(LENGTH - 3000)),
      dataChunk(false, c, OFFSET, bytes(1000)),
      dataChunk(true, c, OFFSET + 1000, bytes(2000)),
    ]],
  ])('may be %s', async (_, reply) => {
    await using client = await clientOf(({ cookie }, peer) => peer.send(...reply(cookie)));
    expect((await client.read(OFFSET, LENGTH)).equals(bytes(LENGTH))).toBe(true);
  });

  test.each<[string, (cookie: bigint) => Buffer[]]>([
    ['no bytes', (c) => [none(c)]],
    ['too few bytes', (c) => [dataChunk(true, c, OFFSET, bytes(LENGTH - 1))]],
    ['a gap', (c) => [dataChunk(false, c, OFFSET, bytes(100)), dataChunk(true, c, OFFSET + 101, bytes(LENGTH - 101))]],
    ['bytes twice', (c) => [dataChunk(false, c, OFFSET, bytes(LENGTH)), holeChunk(true, c, OFFSET + 5, 1)]],
    ['overlapping starts', (c) => [dataChunk(false, c, OFFSET + 10, bytes(10)), dataChunk(true, c, OFFSET, bytes(11))]],
    ['overlapping ends', (c) => [dataChunk(false, c, OFFSET, bytes(10)), dataChunk(true, c, OFFSET + 9, bytes(2))]],
    ['bytes before the range', (c) => [dataChunk(true, c, OFFSET - 1, bytes(LENGTH))]],
    ['bytes after the range', (c) => [dataChunk(true, c, OFFSET + 1, bytes(LENGTH))]],
    ['an offset beyond numbers', (c) => [dataChunk(true, c, 2n ** 64n - 1n, bytes(LENGTH))]],
    ['a hole beyond the range', (c) => [holeChunk(true, c, OFFSET, LENGTH + 1)]],
    ['a hole of no bytes', (c) => [holeChunk(true, c, OFFSET, 0)]],
    ['a chunk of no bytes', (c) => [chunk(true, 1, c, u64(OFFSET))]],
    ['a hole chunk too long', (c) => [chunk(true, 2, c, bytes(13))]],
    ['a chunk of 4 GiB', (c) => [chunk(true, 1, c).subarray(0, 16), u32(2 ** 32 - 1)]],
    ['a block status', (c) => [statusChunk(true, c, 7, [[LENGTH, 0]])]],
    ['an unknown chunk', (c) => [chunk(true, 77, c, bytes(4))]],
    ['an empty chunk before the last', (c) => [chunk(false, 0, c)]],
    ['an end with bytes', (c) => [chunk(true, 0, c, bytes(8))]],
    ['no structure', (c) => [simple(0, c, bytes(LENGTH))]],
    ['another magic', (c) => [u32(0x12345678), u64(c), bytes(8)]],
    ['a cookie of nobody', (c) => [none(c + 1n)]],
    ['a cookie of old', (c) => [none(c + 2n ** 32n)]],
    ['an answer twice', (c) => [dataChunk(true, c, OFFSET, bytes(LENGTH)), none(c)]],
    ['an error of no number', (c) => [errorChunk(true, c, 0)]],
    ['an error of too few bytes', (c) => [chunk(true, 0x8001, c, bytes(5))]],
    ['an error of too many bytes', (c) => [chunk(true, 0x8001, c, bytes(5000))]],
    ['an error with a wrong length', (c) => [chunk(true, 0x8001, c, Buffer.concat([u32(5), Buffer.from([0, 9]), bytes(2)]))]],
    ['errors without end', (c) => Array.from({ length: 100 }, () => errorChunk(false, c, 5))],
    ['too many pieces', (c) => Array.from({ length: 5000 }, (_, i) => holeChunk(false, c, OFFSET + 2 * i, 1))],
  ])('of %s ends the connection with NBD_PROTOCOL', async (what, reply) => {
    await using client = await clientOf(({ cookie }, peer) => peer.send(...reply(cookie)));
    const length = what === 'too many pieces' ? 16 * KiB : LENGTH;
    const asked = [client.read(OFFSET, length), client.read(OFFSET, length)].map(codeOf);
    const codes = await Promise.all(asked);
    expect(codes[1]).toBe('NBD_PROTOCOL');
    expect(codes[0]).toBe(what === 'an answer twice' ? 'resolved' : 'NBD_PROTOCOL');
    expect(await codeOf(client.cache(0, 512))).toBe('NBD_PROTOCOL');
  });

  test('may be an error of any of the known kinds, for it alone', async () => {
    const answers = [
      (c: bigint) => errorChunk(true, c, 5, 'bad \x1b[31mdisk'),
      (c: bigint) => Buffer.concat([dataChunk(false, c, OFFSET, bytes(10)), errorChunk(true, c, 28, '', OFFSET + 10)]),
      (c: bigint) => Buffer.concat([errorChunk(false, c, 1), errorChunk(false, c, 22), none(c)]),
      (c: bigint) => simple(108, c),
      (c: bigint) => chunk(true, 0x8099, c, Buffer.concat([u32(75), Buffer.from([0, 2]), Buffer.from('ab!!')])),
      (c: bigint) => errorChunk(true, c, 4242),
      (c: bigint) => dataChunk(true, c, OFFSET, bytes(LENGTH)),
    ];
    let next = 0;
    await using client = await clientOf(({ cookie }, peer) => peer.send(answers[next++]!(cookie)));
    const codes = await Promise.all(answers.map(() => codeOf(client.read(OFFSET, LENGTH))));
    expect(codes).toEqual(['EIO', 'ENOSPC', 'EPERM', 'ESHUTDOWN', 'EOVERFLOW', 'EINVAL', 'resolved']);
    next = 0;
    const error = await client.read(OFFSET, LENGTH).catch((e: unknown) => e as ThickenError);
    expect(error).toMatchObject({ code: 'EIO', errno: 5, offset: OFFSET, length: LENGTH, syscall: 'READ' });
    expect((error as ThickenError).message).toContain('bad [31mdisk');
  });

  test('may be simple where that was agreed, and then only so', async () => {
    const answer = ({ cookie }: WireRequest, peer: Peer) => peer.send(simple(0, cookie, bytes(LENGTH)));
    await using client = await clientOf(answer, { structured: false });
    expect((await client.read(OFFSET, LENGTH)).equals(bytes(LENGTH))).toBe(true);
    const structured = ({ cookie }: WireRequest, peer: Peer) => peer.send(dataChunk(true, cookie, OFFSET, bytes(LENGTH)));
    await using other = await clientOf(structured, { structured: false });
    expect(await codeOf(other.read(OFFSET, LENGTH))).toBe('NBD_PROTOCOL');
  });
});

describe('a block status', () => {
  const both = (c: bigint, base: number[][], depth: number[][]) => [
    statusChunk(false, c, 9, depth),
    statusChunk(true, c, 7, base),
  ];

  test('is given in the order of the contexts, cut to what was asked', async () => {
    const reply = ({ cookie }: WireRequest, peer: Peer) =>
      peer.send(...both(cookie, [[512, 3], [2 ** 32 - 512, 0]], [[1024, 2]]));
    await using client = await clientOf(reply);
    const [base, depth] = await client.blockStatus(0, LENGTH);
    expect(base).toMatchObject({ context: CONTEXTS[0], length: LENGTH });
    expect([...base!.lengths]).toEqual([512, LENGTH - 512]);
    expect([...base!.flags]).toEqual([3, 0]);
    expect(depth).toMatchObject({ context: CONTEXTS[1], length: 1024 });
  });

  test.each<[string, (cookie: bigint) => Buffer[]]>([
    ['one context too few', (c) => [statusChunk(true, c, 7, [[LENGTH, 0]])]],
    ['no context', (c) => [none(c)]],
    ['a context twice', (c) => both(c, [[LENGTH, 0]], [[LENGTH, 0]]).map((b) => (b.writeUInt32BE(7, 20), b))],
    ['an unknown context', (c) => [statusChunk(true, c, 8, [[LENGTH, 0]])]],
    ['an extent of no bytes', (c) => both(c, [[512, 0], [0, 1]], [[LENGTH, 0]])],
    ['extents beyond the end', (c) => both(c, [[LENGTH, 0], [512, 1]], [[LENGTH, 0]])],
    ['parts of a block', (c) => both(c, [[100, 0]], [[LENGTH, 0]])],
    ['no extents', (c) => [chunk(true, 5, c, u32(7))]],
    ['half an extent', (c) => [chunk(true, 5, c, bytes(8))]],
    ['4 GiB of extents', (c) => [chunk(true, 5, c).subarray(0, 16), u32(2 ** 32 - 4)]],
    ['a simple reply', (c) => [simple(0, c)]],
    ['data', (c) => [dataChunk(true, c, 0, bytes(4))]],
  ])('of %s ends the connection with NBD_PROTOCOL', async (_, reply) => {
    await using client = await clientOf(({ cookie }, peer) => peer.send(...reply(cookie)));
    expect(await codeOf(client.blockStatus(0, LENGTH))).toBe('NBD_PROTOCOL');
    expect(await codeOf(client.blockStatus(0, LENGTH))).toBe('NBD_PROTOCOL');
  });

  test('of several extents is wrong where one was asked for', async () => {
    const reply = ({ cookie }: WireRequest, peer: Peer) => peer.send(...both(cookie, [[512, 0], [512, 1]], [[512, 0]]));
    await using client = await clientOf(reply);
    expect(await codeOf(client.blockStatus(0, LENGTH, { reqOne: true }))).toBe('NBD_PROTOCOL');
  });

  test('left unfinished too often ends the connection before memory ends', async () => {
    const extents = Buffer.concat([u32(7), ...Array.from({ length: 2 ** 20 }, () => u64(2n ** 32n))]);
    const reply = ({ cookie }: WireRequest, peer: Peer) => peer.send(chunk(false, 5, cookie, extents));
    await using client = await clientOf(reply);
    const asked = Array.from({ length: 16 }, () => codeOf(client.blockStatus(0, LENGTH)));
    expect(new Set(await Promise.all(asked))).toEqual(new Set(['NBD_PROTOCOL']));
  });
});

describe('a server that stops', () => {
  test('leaves nobody waiting: closed', async () => {
    await using client = await clientOf((_, peer) => void peer.socket.destroy());
    const asked = [client.read(0, 512), client.cache(0, 512), client.flush(), client.blockStatus(0, 512), client.write(0, bytes(512))];
    expect(await Promise.all(asked.map(codeOf))).toEqual(asked.map(() => 'NBD_LOST'));
    expect(await codeOf(client.flush())).toBe('NBD_LOST');
  });

  test('leaves nobody waiting: half closed', async () => {
    await using client = await clientOf((_, peer) => void peer.socket.end());
    const asked = Array.from({ length: 100 }, () => codeOf(client.read(0, 512)));
    expect(new Set(await Promise.all(asked))).toEqual(new Set(['NBD_LOST']));
  });

  test('leaves nobody waiting: silent, in the middle of a reply', async () => {
    await using client = await clientOf(
      ({ cookie }, peer) => peer.send(dataChunk(true, cookie, 0, bytes(512)).subarray(0, 100)),
      { requestTimeoutMs: 80, maxInFlight: 2 },
    );
    const asked = Array.from({ length: 5 }, () => codeOf(client.read(0, 512)));
    expect(new Set(await Promise.all(asked))).toEqual(new Set(['NBD_TIMEOUT']));
  });

  test('is no reason to crash where memory ends', async () => {
    // READ of as much as the server claims to give: no such buffer can be made on this machine.
    const fake = await fakeServer(async (peer) => {
      peer.send(hello(), ack(8), infoExport(2 ** 45, 1), infoBlockSize(1, 1, 2 ** 32 - 1), ack(7));
      await peer.inbox.take(4);
      while ((await peer.option()).option !== 7);
      const { cookie } = await peer.request();
      peer.send(dataChunk(false, cookie, 0, bytes(1)));
    });
    await using client = await NbdClient.connect(fake);
    const allocate = vi.spyOn(Buffer, 'allocUnsafe').mockImplementation((length) => {
      if (length > 2 ** 31) throw new RangeError('Array buffer allocation failed');
      return Buffer.alloc(length);
    });
    const code = await codeOf(client.read(0, 2 ** 32 - 1));
    allocate.mockRestore();
    expect(code).toBe('INTERNAL');
  });

  test('is not waited for by destroy', async () => {
    let arrived = false;
    const client = await clientOf(() => void (arrived = true));
    const asked = codeOf(client.read(0, 512));
    await waitFor('the request', () => arrived);
    client.destroy();
    expect(await asked).toBe('CLOSED');
    await client.disconnect();
    expect(await codeOf(client.read(0, 512))).toBe('CLOSED');
  });
});

describe('any transmission', () => {
  interface Plan {
    /** What is asked for, and how each is answered. */
    requests: { kind: number; offset: number; length: number; answer: number; cuts: number[] }[];
    garbage: number[];
    ending: number;
  }
  const plans = fc.record<Plan>({
    requests: fc.array(
      fc.record({
        kind: fc.nat(5),
        offset: fc.nat(100),
        length: fc.integer({ min: 1, max: 40 }),
        // Mostly right: else nothing comes far.
        answer: fc.oneof({ weight: 9, arbitrary: fc.constant(0) }, { weight: 1, arbitrary: fc.nat(9) }),
        cuts: fc.array(fc.nat(20_000), { maxLength: 4 }),
      }),
      { minLength: 1, maxLength: 12 },
    ),
    garbage: fc.array(fc.nat(255), { maxLength: 60 }),
    ending: fc.nat(3),
  });

  const model = Buffer.from(Array.from({ length: 2 ** 17 }, (_, i) => (i * 31 + (i >> 9)) & 0xff));

  function rightAnswer({ command, cookie, offset, length }: WireRequest, cuts: number[]): Buffer[] {
    if (command === 7) {
      return [statusChunk(false, cookie, 9, [[length, 1]]), statusChunk(true, cookie, 7, [[length, 3]])];
    }
    if (command !== 0) return [cuts.length % 2 ? simple(0, cookie) : none(cookie)];
    const places = [...new Set([0, ...cuts.map((cut) => cut % length), length])].sort((a, b) => a - b);
    const pieces = places.slice(1).map((end, i) => {
      const start = offset + places[i]!;
      return dataChunk(false, cookie, start, model.subarray(start, offset + end));
    });
    return [...pieces.reverse(), none(cookie)];
  }

  function wrongAnswer(request: WireRequest, how: number): Buffer[] {
    const { cookie } = request;
    const [first, ...others] = rightAnswer(request, [7]);
    switch (how) {
      case 1:
        return [errorChunk(true, cookie, 5, 'sorry')];
      case 2:
        return [simple(28, cookie)];
      case 3:
        return [];
      case 4:
        return [first!, first!, ...others];
      case 5:
        return [first!.subarray(0, first!.length >> 1)];
      case 6:
        return [none(cookie ^ 1n)];
      case 7:
        return [Buffer.from(first!.map((byte, i) => (i === 6 ? byte ^ 4 : byte))), ...others];
      case 8:
        return [Buffer.from(first!.map((byte, i) => (i === 17 ? byte ^ 16 : byte))), ...others];
      default:
        return others;
    }
  }

  /** Answers chunks of all requests in turns, and cuts the bytes into small writes. */
  async function play(peer: Peer, plan: Plan): Promise<void> {
    const queues: Buffer[][] = [];
    for (const { answer, cuts } of plan.requests) {
      const request = await peer.request();
      if (request.command === 1) await peer.inbox.take(request.length);
      queues.push(answer === 0 ? rightAnswer(request, cuts) : wrongAnswer(request, answer));
    }
    for (let left = queues.filter((q) => q.length > 0); left.length > 0; left = left.filter((q) => q.length > 0)) {
      for (const queue of left.reverse()) {
        const part = queue.shift()!;
        const cut = plan.garbage[0] ?? 1;
        peer.socket.write(part.subarray(0, cut));
        await new Promise<unknown>((resolve) => peer.socket.write(part.subarray(cut), resolve));
      }
    }
    if (plan.ending === 1) peer.send(Buffer.from(plan.garbage));
    if (plan.ending === 2) peer.socket.end();
    if (plan.ending === 3) peer.socket.destroy();
  }

  const CODES = ['NBD_LOST', 'NBD_PROTOCOL', 'NBD_TIMEOUT', 'EIO', 'ENOSPC', 'EINVAL'];

  async function ask(client: NbdClient, { kind, offset, length }: Plan['requests'][number]): Promise<string> {
    const [start, count] = [offset * 512, length * 512];
    const requests = [
      async () => expect((await client.read(start, count)).equals(model.subarray(start, start + count))).toBe(true),
      async () => expect((await client.blockStatus(start, count)).map((s) => [s.flags[0], s.length])).toEqual([[3, count], [1, count]]),
      () => client.cache(start, count),
      () => client.flush(),
      () => client.write(start, model.subarray(0, count)),
      () => client.writeZeroes(start, count, { noHole: true }),
    ];
    return codeOf(requests[kind]!());
  }

  test('settles every request, rightly or with an error of ours, whatever the server answers', async () => {
    expect(SIZE).toBeGreaterThan(model.length);
    const seen = new Map<string, number>();
    let plan: Plan | undefined;
    await using fake = await fakeServer(async (peer) => {
      await peer.handshake();
      await play(peer, plan!);
    });
    await fc.assert(
      fc.asyncProperty(plans, async (chosen) => {
        plan = chosen;
        const allRight = chosen.requests.every(({ answer }) => answer === 0);
        // A machine under load must not make a right answer late.
        const requestTimeoutMs = allRight ? 60_000 : 60;
        const client = await NbdClient.connect(fake, { metaContexts: CONTEXTS, requestTimeoutMs });
        const codes = await Promise.all(chosen.requests.map((request) => ask(client, request)));
        client.destroy();
        for (const code of codes) seen.set(code, (seen.get(code) ?? 0) + 1);
        expect(codes.filter((code) => code !== 'resolved' && !CODES.includes(code))).toEqual([]);
        if (allRight) expect(codes.every((code) => code === 'resolved')).toBe(true);
      }),
      { numRuns: process.env.THICKEN_SOAK ? 5000 : 400 },
    );
    expect([...seen.keys()]).toEqual(expect.arrayContaining(['resolved', ...CODES.slice(0, 5)]));
  });
});
