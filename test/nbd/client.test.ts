import { readFileSync } from 'node:fs';
import { createConnection, createServer, type AddressInfo } from 'node:net';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, NbdClient } from '../../lib/nbd/client.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { nbdkit, qemuNbd, storageDaemon, type Server } from './servers.js';

const MiB = 2 ** 20;
const CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH];

async function qcow2(size: string, backing?: string): Promise<string> {
  const path = scratchPath('image.qcow2');
  const from = backing ? ['-b', backing, '-F', 'qcow2'] : [];
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', ...from, path, size]);
  return path;
}

async function chain(): Promise<string> {
  const base = await qcow2('64M');
  await mustRun('qemu-io', ['-c', 'write -P 5 1M 3M', base]);
  return qcow2('64M', base);
}

describe.runIf(requires({ tools: ['qemu-nbd', 'qemu-io'] }))('with qemu-nbd', () => {
  let server: Server;
  beforeAll(async () => {
    server = await qemuNbd(await chain(), 'qcow2', ['-x', 'a b', '-D', 'spare parts']);
  });

  test('the export is described as the server was told', async () => {
    await using client = await NbdClient.connect(`${server.uri.replace('///', '///a%20b')}`, { metaContexts: CONTEXTS });
    expect(client.size).toBe(64 * MiB);
    expect(client.exportName).toBe('a b');
    expect(client.description).toBe('spare parts');
    expect(client.contexts).toEqual(CONTEXTS);
    expect(client.blockSize).toMatchObject({ minimum: 1, maximum: 32 * MiB });
    expect(client.flags).toMatchObject({ readOnly: false, flush: true, fua: true, writeZeroes: true, cache: true });
  });

  test('exports and contexts are listed', async () => {
    expect(await NbdClient.list(server.uri)).toEqual([{ name: 'a b', description: 'spare parts' }]);
    const names = await NbdClient.listMetaContexts(server.uri, { exportName: 'a b' });
    expect(names.sort()).toEqual([...CONTEXTS].sort());
    const some = await NbdClient.listMetaContexts(server.uri, { exportName: 'a b', queries: ['qemu:'] });
    expect(some).toEqual([ALLOCATION_DEPTH]);
  });

  test('an unknown export is refused, with the server’s reason', async () => {
    const refused = NbdClient.connect(server.uri, { exportName: 'other' });
    await expect(refused).rejects.toMatchObject({ code: 'NBD_REFUSED', message: expect.stringContaining('UNKNOWN') });
  });

  test('contexts that the server lacks are left out', async () => {
    await using client = await NbdClient.connect(server.uri, {
      exportName: 'a b',
      metaContexts: ['x-none:of-these', ALLOCATION_DEPTH, ALLOCATION_DEPTH],
    });
    expect(client.contexts).toEqual([ALLOCATION_DEPTH]);
    const [status] = await client.blockStatus(0, 64 * MiB);
    expect([...status!.flags]).toEqual([0, 2, 0]);
    expect([...status!.lengths]).toEqual([MiB, 3 * MiB, 60 * MiB]);
  });

  test('one extent is given where one is asked for, cut to the request', async () => {
    await using client = await NbdClient.connect(server.uri, { exportName: 'a b', metaContexts: CONTEXTS });
    for (const status of await client.blockStatus(MiB, MiB, { reqOne: true })) {
      expect([...status.lengths]).toEqual([MiB]);
      expect(status.length).toBe(MiB);
    }
  });

  test('no block status without a context', async () => {
    await using client = await NbdClient.connect(server.uri, { exportName: 'a b' });
    await expect(client.blockStatus(0, MiB)).rejects.toMatchObject({ code: 'ENOTSUP' });
  });

  test('what is not in the export or not whole is refused before it is sent', async () => {
    await using client = await NbdClient.connect(server.uri, { exportName: 'a b', metaContexts: CONTEXTS });
    const bad: [number, number][] = [[-1, 5], [0, 0], [64 * MiB, 1], [64 * MiB - 1, 2], [0.5, 1], [NaN, 1], [0, Infinity]];
    for (const [offset, length] of bad) {
      const names = ['read', 'cache', 'blockStatus', 'writeZeroes'] as const;
      for (const name of names) {
        await expect(client[name](offset, length)).rejects.toMatchObject({ code: 'RANGE', name: expect.stringMatching(/RangeError/) });
      }
    }
    await expect(client.read(0, 32 * MiB + 1)).rejects.toMatchObject({ code: 'RANGE' });
    expect((await client.read(0, 32 * MiB)).length).toBe(32 * MiB);
  });
});

describe.runIf(requires({ tools: ['qemu-storage-daemon', 'qemu-io'] }))('with a storage daemon', () => {
  test('CACHE copies from the backing file where its node does that, and depths tell', async () => {
    const overlay = await chain();
    const node = {
      driver: 'copy-on-read',
      'node-name': 'disk',
      file: { driver: 'qcow2', file: { driver: 'file', filename: overlay } },
    };
    await using server = await storageDaemon(overlay, 'copy-on-read', node);
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    const depth = async () => (await client.blockStatus(0, 8 * MiB)).find((s) => s.context === ALLOCATION_DEPTH)!;
    const before = await depth();
    await client.cache(MiB, 3 * MiB);
    await client.flush();
    const after = await depth();
    expect([...before.flags]).not.toEqual([...after.flags]);
    expect(Math.max(...after.flags)).toBeLessThan(Math.max(...before.flags));
    expect((await client.read(MiB, 3 * MiB)).every((byte) => byte === 5)).toBe(true);
  });

  test('what is written is in the image, with and without FUA', async () => {
    const image = await qcow2('16M');
    {
      await using server = await storageDaemon(image, 'qcow2');
      await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
      await client.write(MiB, Buffer.alloc(MiB, 7));
      await client.write(3 * MiB, new Uint8Array(65536).fill(9), { fua: true });
      await client.writeZeroes(MiB, 65536, { noHole: true });
      await client.writeZeroes(MiB + 65536, 65536, { fua: true });
      await client.flush();
      const [base] = await client.blockStatus(0, 16 * MiB);
      expect([...base!.lengths].reduce((sum, length) => sum + length, 0)).toBe(16 * MiB);
    }
    const patterns = [[0, MiB, 0], [MiB, 131072, 0], [MiB + 131072, MiB - 131072, 7], [3 * MiB, 65536, 9]];
    const reads = patterns.flatMap(([offset, length, byte]) => ['-c', `read -P ${byte} ${offset} ${length}`]);
    const text = await mustRun('qemu-io', ['-r', '-f', 'qcow2', ...reads, image]);
    expect(text.match(/^read /gm)).toHaveLength(patterns.length);
    expect(text).not.toMatch(/verification failed/i);
  });
});

describe.runIf(requires({ tools: ['nbdkit'] }))('with nbdkit', () => {
  test('holes and data of one read come together, wherever the pieces are cut', async () => {
    await using server = await nbdkit(['data', '(0x11)*100000 @+300000 (0x22)*50000', 'size=1M']);
    await using client = await NbdClient.connect(server.uri);
    const expected = Buffer.alloc(MiB);
    expected.fill(0x11, 0, 100000).fill(0x22, 400000, 450000);
    expect((await client.read(0, MiB)).equals(expected)).toBe(true);
    expect((await client.read(99_999, 300_002)).equals(expected.subarray(99_999, 400_001))).toBe(true);
  });

  test('hundreds of requests at a time find their answers, in whatever order these come', async () => {
    await using server = await nbdkit(['pattern', '64M', 'delay-read=5ms'], ['--filter=delay', '-t', '16']);
    await using client = await NbdClient.connect(server.uri, { maxInFlight: 64 });
    const order: number[] = [];
    const answers = Array.from({ length: 600 }, async (_, i) => {
      const offset = ((i * 7919) % 16000) * 4096;
      // Long and short ones, so that later ones overtake.
      const data = await client.read(offset, i % 5 === 0 ? 131072 : 8);
      order.push(i);
      for (let at = 0; at < data.length; at += 8) {
        if (data.readBigUInt64BE(at) !== BigInt(offset + at)) throw new Error(`wrong bytes at ${offset + at}`);
      }
    });
    await Promise.all(answers);
    expect(order).toHaveLength(600);
    expect(order).not.toEqual([...order].sort((a, b) => a - b));
  });

  test('block sizes are told, kept, and checked here before the server does', async () => {
    const sizes = ['blocksize-minimum=512', 'blocksize-preferred=8K', 'blocksize-maximum=64K', 'blocksize-error-policy=error'];
    await using server = await nbdkit(['memory', '1M', ...sizes], ['--filter=blocksize-policy']);
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    expect(client.blockSize).toEqual({ minimum: 512, preferred: 8192, maximum: 65536 });
    await expect(client.read(1, 512)).rejects.toMatchObject({ code: 'RANGE' });
    await expect(client.read(512, 511)).rejects.toMatchObject({ code: 'RANGE' });
    await expect(client.read(0, 65536 + 512)).rejects.toMatchObject({ code: 'RANGE' });
    expect((await client.read(512, 65536)).length).toBe(65536);
    const [status] = await client.blockStatus(0, MiB);
    expect(status!.length).toBe(MiB);
  });

  test('a server without structured replies serves data, and no block status', async () => {
    await using server = await nbdkit(['data', '(0x33)*1000', 'size=64K'], ['--no-sr']);
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    expect(client.contexts).toEqual([]);
    expect((await client.read(0, 2000)).equals(Buffer.alloc(2000).fill(0x33, 0, 1000))).toBe(true);
    await expect(client.blockStatus(0, 65536)).rejects.toMatchObject({ code: 'ENOTSUP' });
    expect(await NbdClient.listMetaContexts(server.uri)).toEqual([]);
  });

  test('an oldstyle server is refused in plain words', async () => {
    await using server = await nbdkit(['memory', '1M'], ['--oldstyle']);
    const refused = NbdClient.connect(server.uri);
    await expect(refused).rejects.toMatchObject({ code: 'NBD_REFUSED', message: expect.stringContaining('oldstyle') });
  });

  test.each([['--mask-handshake=0', 'NBD_REFUSED'], ['--mask-handshake=1', null]])('%s', async (mask, code) => {
    await using server = await nbdkit(['memory', '1M'], [mask]);
    const connecting = NbdClient.connect(server.uri);
    if (code) {
      await expect(connecting).rejects.toMatchObject({ code });
      return;
    }
    await using client = await connecting;
    expect(client.size).toBe(MiB);
  });

  test('a read-only export is not written, nor even asked', async () => {
    await using server = await nbdkit(['memory', '1M'], ['-r']);
    await using client = await NbdClient.connect(server.uri);
    expect(client.flags.readOnly).toBe(true);
    await expect(client.write(0, Buffer.alloc(512))).rejects.toMatchObject({ code: 'EPERM' });
    await expect(client.writeZeroes(0, 512)).rejects.toMatchObject({ code: 'EPERM' });
    await client.flush();
  });

  test('what the server does not offer is refused here', async () => {
    await using server = await nbdkit(['eval', "get_size=echo 1M", "pread=head -c $3 /dev/zero", "pwrite=cat > /dev/null"], ['--filter=nozero']);
    await using client = await NbdClient.connect(server.uri);
    await expect(client.write(0, Buffer.alloc(512), { fua: true })).rejects.toMatchObject({ code: 'ENOTSUP' });
    await expect(client.writeZeroes(0, 512)).rejects.toMatchObject({ code: 'ENOTSUP' });
    await expect(client.cache(0, 512)).rejects.toMatchObject({ code: 'ENOTSUP' });
    await expect(client.flush()).rejects.toMatchObject({ code: 'ENOTSUP' });
    await client.write(0, Buffer.alloc(512));
  });

  test('exports of more bytes than a number holds are refused', async () => {
    await using server = await nbdkit(['null', `size=${2n ** 53n}`]);
    await expect(NbdClient.connect(server.uri)).rejects.toMatchObject({ code: 'RANGE' });
    await using most = await nbdkit(['null', `size=${2n ** 53n - 512n}`]);
    await using client = await NbdClient.connect(most.uri);
    expect(client.size).toBe(2 ** 53 - 512);
    expect((await client.read(client.size - 512, 512)).equals(Buffer.alloc(512))).toBe(true);
  });
});

describe.runIf(requires({ tools: ['nbdkit'] }))('the way to the server', () => {
  let server: Server;
  beforeAll(async () => {
    server = await nbdkit(['pattern', '1M']);
  });

  test('may be TCP, by name and by address', async () => {
    const relay = createServer((socket) => {
      const inner = createConnection(server.socketPath);
      socket.pipe(inner).pipe(socket);
      for (const end of [socket, inner]) end.on('error', () => [socket, inner].forEach((s) => s.destroy()));
    });
    await new Promise<void>((resolve) => relay.listen(0, '127.0.0.1', resolve));
    const { port } = relay.address() as AddressInfo;
    for (const address of [`nbd://localhost:${port}`, { host: '127.0.0.1', port }]) {
      await using client = await NbdClient.connect(address);
      expect((await client.read(8, 8)).readBigUInt64BE()).toBe(8n);
    }
    await new Promise((resolve) => relay.close(resolve));
  });

  test('may be a stream that is open already', async () => {
    const stream = createConnection(server.socketPath);
    await using client = await NbdClient.connect({ stream });
    expect((await client.read(16, 8)).readBigUInt64BE()).toBe(16n);
  });

  test('may not be there', async () => {
    const nowhere = scratchPath('nowhere');
    const lost = NbdClient.connect({ socketPath: nowhere });
    await expect(lost).rejects.toMatchObject({ code: 'NBD_LOST', message: expect.stringContaining('ENOENT') });
    expect(() => readFileSync(nowhere)).toThrow();
  });

  test('may be given up', async () => {
    const aborted = AbortSignal.abort();
    await expect(NbdClient.connect(server.uri, { signal: aborted })).rejects.toMatchObject({ code: 'CANCELLED' });
  });

  test.each([{ maxInFlight: 0 }, { maxInFlight: 1e6 }, { metaContexts: [''] }, { metaContexts: Array.from({ length: 33 }, (_, i) => `x:${i}`) }, { maxBytesInFlight: -1 }, { requestTimeoutMs: 0.5 }, { requestTimeoutMs: 2 ** 31 }, { timeoutMs: 0 }, { timeoutMs: 2 ** 31 }, { exportName: 'x'.repeat(4097) }, { exportName: 'a\0' }])(
    'is not taken with %o',
    async (options) => {
      await expect(NbdClient.connect(server.uri, options)).rejects.toMatchObject({ code: 'USAGE' });
    },
  );

  afterAll(() => server[Symbol.asyncDispose]());
});
