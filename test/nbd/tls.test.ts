import { copyFileSync, mkdirSync, readFileSync } from 'node:fs';
import { createConnection, createServer, type AddressInfo } from 'node:net';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { NbdClient } from '../../lib/nbd/client.js';
import { hold } from '../support/cleanup.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { authority, certificate } from './certificates.js';
import { nbdkit, type Server } from './servers.js';

/** What listens on TCP for a server on a unix socket. */
async function tcpPort(server: Server): Promise<number> {
  const relay = createServer((socket) => {
    const inner = createConnection(server.socketPath);
    socket.pipe(inner).pipe(socket);
    for (const end of [socket, inner]) end.on('error', () => [socket, inner].forEach((s) => s.destroy()));
  });
  await new Promise<void>((resolve) => relay.listen(0, '127.0.0.1', resolve));
  hold({ release: async () => void relay.close(), releaseSync: () => void relay.close() });
  return (relay.address() as AddressInfo).port;
}

describe.runIf(requires({ tools: ['nbdkit', 'openssl'] }))('TLS', () => {
  const folder = scratchPath('pki');
  const other = scratchPath('other-pki');
  const own = scratchPath('own');
  const ca = () => readFileSync(join(folder, 'ca-cert.pem'));
  let server: Server;
  let picky: Server;

  beforeAll(async () => {
    await authority(folder);
    await authority(other);
    await certificate(folder, 'server', 'subjectAltName=DNS:localhost,DNS:disks.example,IP:127.0.0.1');
    await certificate(folder, 'client', 'subjectAltName=DNS:client');
    mkdirSync(own);
    for (const name of ['ca-cert.pem', 'client-cert.pem', 'client-key.pem']) copyFileSync(join(folder, name), join(own, name));
    const options = ['--tls=require', `--tls-certificates=${folder}`];
    server = await nbdkit(['pattern', '64M'], options);
    picky = await nbdkit(['pattern', '1M'], [...options, '--tls-verify-peer']);
  });

  const tlsUri = (of: Server, query = '') => `${of.uri.replace('nbd+', 'nbds+')}${query}`;

  test('that the server requires is asked for in plain words', async () => {
    const refused = NbdClient.connect(server.uri);
    await expect(refused).rejects.toMatchObject({ code: 'NBD_REFUSED', message: expect.stringContaining('nbds') });
  });

  test('carries many requests', async () => {
    await using client = await NbdClient.connect(server.uri, { tls: { ca: ca() }, maxInFlight: 32 });
    await Promise.all(
      Array.from({ length: 60 }, async (_, i) => {
        const data = await client.read(i * 2 ** 20, 2 ** 20);
        for (let at = 0; at < data.length; at += 65536) expect(data.readBigUInt64BE(at)).toBe(BigInt(i * 2 ** 20 + at));
      }),
    );
    await client.disconnect();
  });

  test('goes over TCP to a name, to an address, and to a name that is given', async () => {
    const port = await tcpPort(server);
    for (const host of ['localhost', '127.0.0.1']) {
      await using client = await NbdClient.connect(`nbds://${host}:${port}`, { tls: { ca: ca() } });
      expect((await client.read(8, 8)).readBigUInt64BE()).toBe(8n);
    }
    await using client = await NbdClient.connect(`nbds://127.0.0.1:${port}`, { tls: { ca: ca(), servername: 'disks.example' } });
    expect(client.size).toBe(2 ** 26);
  });

  test('takes a folder of certificates from the URI, the client’s own among them', async () => {
    await using client = await NbdClient.connect(tlsUri(picky, `&tls-certificates=${own}`));
    expect((await client.read(0, 16)).readBigUInt64BE(8)).toBe(8n);
    const nowhere = NbdClient.connect(tlsUri(picky, '&tls-certificates=/nonexistent'));
    await expect(nowhere).rejects.toMatchObject({ code: 'NBD_TLS' });
  });

  test('lists exports too', async () => {
    expect(await NbdClient.list(server.uri, { tls: { ca: ca() } })).toEqual([{ name: '', description: '' }]);
  });

  test.each<[string, () => object]>([
    ['of an unknown authority', () => ({ ca: readFileSync(join(other, 'ca-cert.pem')) })],
    ['of no authority', () => ({})],
    ['of another name', () => ({ ca: ca(), servername: 'other.example' })],
    ['of another address', () => ({ ca: ca(), servername: '127.0.0.2' })],
    ['with a malformed certificate of ours', () => ({ ca: ca(), cert: 'nonsense', key: 'nonsense' })],
  ])('%s is refused', async (_, tls) => {
    await expect(NbdClient.connect(server.uri, { tls: tls() })).rejects.toMatchObject({ code: 'NBD_TLS' });
  });

  test('without a client’s certificate where one is required fails', async () => {
    // With TLS 1.3 the server looks at it when the client already holds the handshake for done.
    const refused = NbdClient.connect(picky.uri, { tls: { ca: ca() } });
    await expect(refused).rejects.toMatchObject({ code: expect.stringMatching(/^NBD_(TLS|LOST)$/) });
  });

  test('that the server lacks is refused', async () => {
    await using plain = await nbdkit(['memory', '1M'], ['--tls=off']);
    await expect(NbdClient.connect(tlsUri(plain))).rejects.toMatchObject({ code: 'NBD_REFUSED' });
  });

  test('ends with a killed server as anything else does', async () => {
    await using slow = await nbdkit(['memory', '1M', 'delay-read=60'], ['--filter=delay', '--tls=require', `--tls-certificates=${folder}`]);
    await using client = await NbdClient.connect(slow.uri, { tls: { ca: ca() } });
    const reads = Array.from({ length: 50 }, () => client.read(0, 512).catch((error: unknown) => (error as { code: string }).code));
    await new Promise((resolve) => setImmediate(resolve));
    slow.process.kill('SIGKILL');
    expect(new Set(await Promise.all(reads))).toEqual(new Set(['NBD_LOST']));
  });
});
