import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { NbdClient } from '../../lib/nbd/client.js';
import {
  ack,
  exportListed,
  fakeServer,
  hello,
  infoBlockSize,
  infoExport,
  metaContext,
  optionReply,
  refusal,
  transcript,
  u32,
  u64,
  type Fake,
  type Peer,
} from './wire.js';

const CONTEXTS = ['base:allocation', 'qemu:allocation-depth'];
const TALKS = ['NBD_LOST', 'NBD_PROTOCOL', 'NBD_REFUSED', 'NBD_TIMEOUT', 'RANGE'];

async function connectTo(talk: (peer: Peer) => void | Promise<void>, options = {}): Promise<NbdClient> {
  await using fake = await fakeServer(talk);
  return await NbdClient.connect(fake, { metaContexts: CONTEXTS, timeoutMs: 30_000, ...options });
}

const says = (...parts: Buffer[]) => (peer: Peer) => peer.send(...parts);

/** A transcript with one part replaced. */
function instead(index: number, ...parts: Buffer[]): Buffer[] {
  const all = transcript();
  all.splice(index, 1, ...parts);
  return all;
}

describe('a handshake', () => {
  test('as it should be gives a client', async () => {
    const client = await connectTo(says(...transcript()));
    expect(client.contexts).toEqual(CONTEXTS);
    client.destroy();
  });

  test.each<[string, string, Buffer[]]>([
    ['another protocol', 'NBD_PROTOCOL', [Buffer.from('SSH-2.0-OpenSSH_9.2p1 Debian\r\n')]],
    ['a wrong second magic', 'NBD_PROTOCOL', [Buffer.from('NBDMAGICNBDMAGIC\0\x03')]],
    ['oldstyle', 'NBD_REFUSED', [Buffer.from('NBDMAGIC'), u64(0x420281861253n), u64(512), Buffer.alloc(128)]],
    ['no fixed newstyle', 'NBD_REFUSED', [hello(2)]],
    ['a wrong reply magic', 'NBD_PROTOCOL', instead(1, Buffer.alloc(20))],
    ['an answer to another option', 'NBD_PROTOCOL', instead(1, ack(7))],
    ['an answer of endless length', 'NBD_PROTOCOL', instead(1, ack(8).subarray(0, 16), u32(2 ** 32 - 1))],
    ['an INFO to STRUCTURED_REPLY', 'NBD_PROTOCOL', instead(1, infoExport(1, 1))],
    ['a context not asked for', 'NBD_PROTOCOL', instead(2, metaContext(7, 'x:y'))],
    ['a context twice', 'NBD_PROTOCOL', instead(2, metaContext(5, CONTEXTS[1]!))],
    ['one number for two contexts', 'NBD_PROTOCOL', instead(3, metaContext(7, CONTEXTS[1]!))],
    ['a context without a name', 'NBD_PROTOCOL', instead(2, metaContext(7, ''))],
    ['no size', 'NBD_PROTOCOL', instead(5)],
    ['a size of too few bytes', 'NBD_PROTOCOL', instead(5, optionReply(7, 3, Buffer.alloc(11)))],
    ['an INFO of one byte', 'NBD_PROTOCOL', instead(5, optionReply(7, 3, Buffer.alloc(1)))],
    ['a size beyond numbers', 'RANGE', instead(5, infoExport(2n ** 64n - 1n, 1))],
    ['a minimum of 0', 'NBD_PROTOCOL', instead(6, infoBlockSize(0, 4096, 65536))],
    ['a minimum of 3', 'NBD_PROTOCOL', instead(6, infoBlockSize(3, 4096, 65536))],
    ['a minimum of 128 KiB', 'NBD_PROTOCOL', instead(6, infoBlockSize(131072, 131072, 131072))],
    ['a preferred size below the minimum', 'NBD_PROTOCOL', instead(6, infoBlockSize(512, 256, 65536))],
    ['a maximum below the minimum', 'NBD_PROTOCOL', instead(6, infoBlockSize(512, 512, 256))],
    ['a maximum in no whole blocks', 'NBD_PROTOCOL', instead(6, infoBlockSize(512, 512, 1000))],
    ['block sizes of too few bytes', 'NBD_PROTOCOL', instead(6, optionReply(7, 3, Buffer.from([0, 3, 1])))],
    ['TLS first', 'NBD_REFUSED', [hello(), refusal(8, 5)]],
    ['TLS before contexts', 'NBD_REFUSED', [hello(), ack(8), refusal(10, 5)]],
    ['an unknown export', 'NBD_REFUSED', [...transcript().slice(0, 5), refusal(7, 6, 'no such thing')]],
  ])('with %s fails with %s', async (_, code, parts) => {
    expect(parts.length).toBeGreaterThan(0);
    await expect(connectTo(says(...parts))).rejects.toMatchObject({ code, path: expect.stringContaining('fake') });
  });

  test('without the wanted contexts, or their option, gives a client without', async () => {
    for (const parts of [[ack(10)], [refusal(10, 1)]]) {
      const all = transcript();
      all.splice(2, 3, ...parts);
      const client = await connectTo(says(...all));
      expect(client.contexts).toEqual([]);
      client.destroy();
    }
  });

  test('may tell what nobody knows, but not for ever', async () => {
    const unknown = optionReply(7, 3, Buffer.from([0xff, 1, 2, 3]));
    const client = await connectTo(says(...instead(5, unknown, infoExport(4096, 1))));
    expect(client.size).toBe(4096);
    client.destroy();
    const endless = instead(5, ...Array.from({ length: 100 }, () => unknown));
    await expect(connectTo(says(...endless))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' });
  });

  test('falls back to the option that all servers know', async () => {
    for (const flags of [1, 3]) {
      const bare = Buffer.concat([u64(8192), Buffer.from([0, 1]), Buffer.alloc(flags & 2 ? 0 : 124)]);
      const client = await connectTo(says(hello(flags), refusal(8, 1), refusal(7, 1), bare));
      expect(client.size).toBe(8192);
      client.destroy();
    }
  });

  test('shows a server’s words without what could harm a terminal', async () => {
    const words = `\x1b]0;owned\x07\x1b[2J bad\u202e\u2028\r\n\0news${'!'.repeat(4000)}`;
    const error = await connectTo(says(...transcript().slice(0, 5), refusal(7, 2, words))).catch((e: unknown) => e);
    const { message, code } = error as ThickenError;
    expect(code).toBe('NBD_REFUSED');
    expect(message).toContain('bad');
    expect(message).toContain('news!!!');
    expect(message).not.toMatch(/[\p{Cc}\p{Cf}\u2028]/u);
    expect(message.length).toBeLessThan(600);
  });

  test('that stops is given up after the time that was allowed', async () => {
    for (const parts of [[], transcript().slice(0, 4)]) {
      await expect(connectTo(says(...parts), { timeoutMs: 50 })).rejects.toMatchObject({ code: 'NBD_TIMEOUT' });
    }
  });

  test('ends when its signal aborts', async () => {
    const abort = new AbortController();
    const connecting = connectTo(() => abort.abort(), { signal: abort.signal });
    await expect(connecting).rejects.toMatchObject({ code: 'CANCELLED' });
  });

  test('that floods is ended before memory is', async () => {
    let flooded = 0;
    const flood = async ({ socket }: Peer) => {
      const bytes = Buffer.alloc(65536);
      while (!socket.destroyed && flooded < 2 ** 28) {
        flooded += bytes.length;
        await new Promise<unknown>((resolve) => socket.write(bytes, resolve));
      }
    };
    const reply = optionReply(8, 1, Buffer.alloc(0));
    await using fake = await fakeServer(async (peer) => {
      peer.send(hello(), reply.subarray(0, 3));
      peer.send(Buffer.alloc(4));
      await flood(peer);
    });
    await expect(NbdClient.connect(fake)).rejects.toBeInstanceOf(ThickenError);
    expect(flooded).toBeLessThan(2 ** 28);
  });

  test('goes on without TLS after agreeing to it: refused', async () => {
    const talk = says(hello(), ack(5), ack(8));
    await expect(connectTo(talk, { tls: true })).rejects.toMatchObject({ code: 'NBD_PROTOCOL' });
  });
});

describe('a list', () => {
  async function list(...parts: Buffer[]) {
    await using fake = await fakeServer(says(hello(), ...parts));
    return await NbdClient.list(fake);
  }

  test('is what the server says, and ends', async () => {
    const listed = await list(exportListed('a', 'first'), exportListed('ü'), ack(3));
    expect(listed).toEqual([{ name: 'a', description: 'first' }, { name: 'ü', description: '' }]);
    await expect(list(refusal(3, 2, 'not you'))).rejects.toMatchObject({ code: 'NBD_REFUSED' });
    await expect(list(optionReply(3, 2, u32(9)))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' });
    await expect(list(optionReply(3, 2, Buffer.alloc(2)))).rejects.toMatchObject({ code: 'NBD_PROTOCOL' });
  });

  test('without an end is given up', async () => {
    const many = Buffer.concat(Array.from({ length: 1000 }, () => exportListed('x'.repeat(4000))));
    const endless = async (peer: Peer) => {
      peer.send(hello());
      while (!peer.socket.destroyed) await new Promise<unknown>((resolve) => peer.socket.write(many, resolve));
    };
    await using fake = await fakeServer(endless);
    await expect(NbdClient.list(fake)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' });
  });
});

type Ending = 'end' | 'reset' | 'silence' | 'garbage';

interface Mutation {
  kind: 'flip' | 'cut' | 'insert' | 'repeat';
  at: number;
  byte: number;
}

const mutations = fc.array(
  fc.record<Mutation>({
    kind: fc.constantFrom('flip', 'cut', 'insert', 'repeat'),
    at: fc.nat(400),
    byte: fc.nat(255),
  }),
  { maxLength: 4 },
);
const endings = fc.constantFrom<Ending>('end', 'reset', 'silence', 'garbage');

function mutate(bytes: Buffer, { kind, at, byte }: Mutation): Buffer {
  const place = at % (bytes.length + 1);
  const [before, after] = [bytes.subarray(0, place), bytes.subarray(place)];
  switch (kind) {
    case 'flip':
      return Buffer.concat([before, Buffer.from([byte]), after.subarray(1)]);
    case 'cut':
      return Buffer.concat([before, after.subarray(1 + (byte % 40))]);
    case 'insert':
      return Buffer.concat([before, Buffer.alloc(1 + (byte % 20), byte), after]);
    case 'repeat':
      return Buffer.concat([before, after.subarray(0, byte), after]);
  }
}

function finish({ socket }: Peer, ending: Ending): void {
  if (ending === 'end') socket.end();
  if (ending === 'reset') socket.destroy();
  if (ending === 'garbage') socket.write(Buffer.alloc(100_000, 0xa5));
}

/** One of each outcome; by chance alone, one run in some thousand would lack one. */
function everyOutcome(): [Mutation[], Ending, boolean][] {
  const last = Buffer.concat(transcript(true)).length - 1;
  const incomplete: Mutation[] = [{ kind: 'cut', at: last, byte: 0 }];
  return [
    [[], 'silence', true],
    [incomplete, 'silence', true],
    [incomplete, 'end', true],
    [[{ kind: 'flip', at: 0, byte: 0 }], 'silence', true],
  ];
}

describe('any handshake', () => {
  test('settles, as a client or as an error of ours, whatever the server sends', async () => {
    let script: { bytes: Buffer; ending: Ending } | undefined;
    const outcomes = new Set<string>();
    await using fake: Fake = await fakeServer((peer) => {
      peer.send(script!.bytes);
      finish(peer, script!.ending);
    });
    await fc.assert(
      fc.asyncProperty(mutations, endings, fc.boolean(), async (changes, ending, structured) => {
        const bytes = changes.reduce(mutate, Buffer.concat(transcript(structured)));
        script = { bytes, ending };
        const outcome = await NbdClient.connect(fake, { metaContexts: CONTEXTS, timeoutMs: 40 }).catch((e: unknown) => e);
        if (outcome instanceof NbdClient) {
          outcomes.add('client');
          outcome.destroy();
        } else {
          expect(outcome).toBeInstanceOf(ThickenError);
          expect(TALKS).toContain((outcome as ThickenError).code);
          outcomes.add((outcome as ThickenError).code);
        }
      }),
      { numRuns: process.env.THICKEN_SOAK ? 5000 : 400, examples: everyOutcome() },
    );
    expect([...outcomes]).toEqual(expect.arrayContaining(['client', 'NBD_PROTOCOL', 'NBD_LOST', 'NBD_TIMEOUT']));
  });
});
