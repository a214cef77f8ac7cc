import { existsSync, rmSync, writeFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { NbdClient } from '../../lib/nbd/client.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { nbdkit } from './servers.js';
import { dataChunk, fakeServer, none, type Peer, type WireRequest } from './wire.js';

const codeOf = (promise: Promise<unknown>): Promise<string> =>
  promise.then(() => 'resolved', (error: unknown) => (error instanceof ThickenError ? error.code : String(error)));

const replyTo = ({ command, cookie, offset, length }: WireRequest) =>
  command === 0 ? dataChunk(true, cookie, offset, Buffer.alloc(length, offset / 512)) : none(cookie);

/** A server that keeps all requests until it is told to answer. */
async function holdingServer() {
  const held: { request: WireRequest; peer: Peer }[] = [];
  const seen = { most: 0, total: 0, goodbye: false };
  const fake = await fakeServer(async (peer) => {
    await peer.handshake();
    for (;;) {
      const request = await peer.request();
      if (request.command === 1) await peer.inbox.take(request.length);
      if (request.command === 2) {
        seen.goodbye = held.length === 0;
        return void peer.socket.end();
      }
      held.push({ request, peer });
      seen.total++;
      seen.most = Math.max(seen.most, held.length);
    }
  });
  const answer = (count: number) => {
    for (const { request, peer } of held.splice(0, count)) peer.send(replyTo(request));
  };
  return { fake, held, seen, answer };
}

describe('requests in flight', () => {
  test('are as many as allowed; the others go in order as answers come', async () => {
    const { fake, held, seen, answer } = await holdingServer();
    await using client = await NbdClient.connect(fake, { maxInFlight: 4 });
    const reads = Array.from({ length: 20 }, (_, i) => client.read(i * 512, 512));
    for (let done = 0; done < 20; done += 4) {
      await waitFor('four requests', () => held.length === 4);
      expect(held.map(({ request }) => request.offset / 512)).toEqual([0, 1, 2, 3].map((i) => done + i));
      answer(4);
    }
    const data = await Promise.all(reads);
    expect(data.map((bytes) => bytes[0])).toEqual(Array.from({ length: 20 }, (_, i) => i));
    expect(seen.most).toBe(4);
  });

  test('carry no more bytes than allowed, but one may be larger alone', async () => {
    const { fake, held, answer } = await holdingServer();
    await using client = await NbdClient.connect(fake, { maxBytesInFlight: 1024 });
    const reads = [client.read(0, 4096), client.cache(0, 8192), client.read(0, 512), client.write(0, Buffer.alloc(512)), client.read(0, 512), client.cache(0, 2 ** 20)];
    for (const sizes of [[4096, 8192], [512, 512], [512, 2 ** 20]]) {
      await waitFor(`requests of ${sizes.join()}`, () => held.length === sizes.length);
      expect(held.map(({ request }) => request.length)).toEqual(sizes);
      answer(sizes.length);
    }
    await Promise.all(reads);
  });

  test('that are cancelled while they wait are never sent', async () => {
    const { fake, held, seen, answer } = await holdingServer();
    await using client = await NbdClient.connect(fake, { maxInFlight: 1 });
    const abort = new AbortController();
    const first = client.read(0, 512);
    const cancelled = Array.from({ length: 50 }, () => codeOf(client.read(512, 512, { signal: abort.signal })));
    const last = client.read(1024, 512);
    abort.abort();
    expect(new Set(await Promise.all(cancelled))).toEqual(new Set(['CANCELLED']));
    expect(await codeOf(client.read(0, 512, { signal: abort.signal }))).toBe('CANCELLED');
    for (let i = 0; i < 2; i++) {
      await waitFor('a request', () => held.length === 1);
      answer(1);
    }
    await Promise.all([first, last]);
    expect(seen.total).toBe(2);
  });

  test('that are cancelled after they were sent keep their place until answered', async () => {
    const { fake, held, answer } = await holdingServer();
    await using client = await NbdClient.connect(fake, { maxInFlight: 2 });
    const abort = new AbortController();
    const cancelled = [client.read(0, 512, { signal: abort.signal }), client.cache(0, 512, { signal: abort.signal })].map(codeOf);
    const next = client.read(512, 512);
    await waitFor('two requests', () => held.length === 2);
    abort.abort();
    expect(await Promise.all(cancelled)).toEqual(['CANCELLED', 'CANCELLED']);
    expect(held).toHaveLength(2);
    answer(2);
    await waitFor('the third', () => held.length === 1);
    answer(1);
    expect((await next)[0]).toBe(1);
  });

  test('share one signal by hundreds without a warning, and without a trace after', async () => {
    const warnings: Error[] = [];
    const note = (warning: Error) => warnings.push(warning);
    process.on('warning', note);
    const { fake, held, answer } = await holdingServer();
    await using client = await NbdClient.connect(fake, { maxInFlight: 500 });
    const abort = new AbortController();
    const reads = Array.from({ length: 500 }, () => client.read(0, 512, { signal: abort.signal }));
    await waitFor('all of them', () => held.length === 500);
    answer(500);
    await Promise.all(reads);
    abort.abort();
    await new Promise((resolve) => setImmediate(resolve));
    process.off('warning', note);
    expect(warnings).toEqual([]);
  });

  test('with a payload are cancelled when its buffer is not read any more', async () => {
    let reading: Peer | undefined;
    await using fake = await fakeServer(async (peer) => {
      await peer.handshake();
      peer.socket.pause();
      reading = peer;
    });
    await using client = await NbdClient.connect(fake);
    const abort = new AbortController();
    const data = Buffer.alloc(2 ** 20, 1);
    let settled = false;
    const code = codeOf(client.write(0, data, { signal: abort.signal })).finally(() => (settled = true));
    await waitFor('the server to stop reading', () => reading !== undefined);
    abort.abort();
    await new Promise((resolve) => setTimeout(resolve, 50));
    // More than a socket's buffers hold: part of it is still the caller's.
    expect(settled).toBe(false);
    reading!.socket.resume();
    expect(await code).toBe('CANCELLED');
    expect((await reading!.inbox.take(28 + data.length)).subarray(28).equals(data)).toBe(true);
    client.destroy();
  });
});

describe('disconnecting', () => {
  test('waits for what is under way or waits, then says goodbye', async () => {
    const { fake, held, seen, answer } = await holdingServer();
    const client = await NbdClient.connect(fake, { maxInFlight: 1 });
    const reads = [client.read(0, 512), client.read(512, 512)];
    const ended = client.disconnect();
    expect(client.disconnect()).toBe(ended);
    expect(await codeOf(client.read(0, 512))).toBe('CLOSED');
    for (let i = 0; i < 2; i++) {
      await waitFor('a request', () => held.length === 1);
      answer(1);
    }
    await Promise.all(reads);
    await ended;
    expect(seen.goodbye).toBe(true);
    expect(await codeOf(client.flush())).toBe('CLOSED');
  });

  test('does not depend on a server that stays', async () => {
    await using fake = await fakeServer(async (peer) => peer.handshake());
    const client = await NbdClient.connect(fake);
    await client.disconnect();
    expect(await codeOf(client.flush())).toBe('CLOSED');
  });
});

describe.runIf(requires({ tools: ['nbdkit'] }))('a server', () => {
  test('that is killed loses all requests, and nothing else', async () => {
    await using server = await nbdkit(['memory', '64M', 'delay-read=60'], ['--filter=delay', '-t', '4']);
    await using client = await NbdClient.connect(server.uri, { metaContexts: ['base:allocation'] });
    await client.blockStatus(0, 4096);
    const reads = Array.from({ length: 200 }, (_, i) => codeOf(client.read(i * 4096, 4096)));
    await new Promise((resolve) => setImmediate(resolve));
    server.process.kill('SIGKILL');
    const codes = await Promise.all(reads);
    expect(new Set(codes)).toEqual(new Set(['NBD_LOST']));
    await client.disconnect();
  });

  test.each(['ENOSPC', 'EIO', 'EPERM'])('that fails with %s fails that request alone', async (errno) => {
    const file = scratchPath('fail');
    const options = [`error-pwrite=${errno}`, 'error-pwrite-rate=100%', `error-pwrite-file=${file}`];
    await using server = await nbdkit(['memory', '16M', ...options], ['--filter=error']);
    await using client = await NbdClient.connect(server.uri);
    writeFileSync(file, '');
    expect(existsSync(file)).toBe(true);
    const [write, read] = await Promise.allSettled([client.write(8192, Buffer.alloc(512)), client.read(0, 512)]);
    expect(write).toMatchObject({ status: 'rejected', reason: { code: errno, offset: 8192, length: 512, syscall: 'WRITE' } });
    expect(read.status).toBe('fulfilled');
    rmSync(file);
    await client.write(8192, Buffer.alloc(512, 3));
    expect((await client.read(8192, 1))[0]).toBe(3);
  });

  test('that fails at random fails just as many as it says, and the others are right', async () => {
    await using server = await nbdkit(['pattern', '64M', 'error-pread=EIO', 'error-pread-rate=30%'], ['--filter=error', '-t', '8']);
    await using client = await NbdClient.connect(server.uri, { maxInFlight: 64 });
    const codes = await Promise.all(
      Array.from({ length: 500 }, async (_, i) => {
        const data = await client.read(i * 4096, 4096).catch((error: unknown) => (error as ThickenError).code);
        if (typeof data === 'string') return data;
        return data.readBigUInt64BE(0) === BigInt(i * 4096) ? 'right' : 'wrong';
      }),
    );
    expect(new Set(codes)).toEqual(new Set(['right', 'EIO']));
  });
});
