/** Layers that NBD servers have. */
import { copyFileSync, existsSync, mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import type { ImageInfo } from '../../lib/types.js';
import { authority, certificate } from '../nbd/certificates.js';
import { nbdkit, serveFile, type Server } from '../nbd/servers.js';
import { cliJson, type Refusal } from '../storage/helpers.js';
import { freePort } from '../support/ports.js';
import { mustRun, start } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { allocate, expectOwn, expectSame, lookBefore, makeBelow, makeOverlay, SIZE, type Before } from './disks.js';
import { expectNothingLeft, withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['nbdkit', 'sha256sum', 'openssl'] });
const QCOW2 = ['--format', 'qcow2'];

/** An image over a file, which then names something else that has the same bytes. */
async function makeDisk(base: string, format: string, name: string, files: string[]): Promise<{ path: string; before: Before }> {
  const path = await makeOverlay({ name: base, format });
  await qemuIo(path, 'qcow2', 'write -q -P 99 1M 100k', 'write -q -P 98 5000k 4k', 'write -q -z 10M 256k');
  const before = await lookBefore(path, 'qcow2', files);
  await mustRun('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-b', name, '-F', format, path]);
  return { path, before };
}

async function codeOf(args: string[]): Promise<Refusal['error']> {
  const { status, document } = await cliJson<Refusal>(args);
  expect(status).toBe(1);
  return document.error;
}

describe.runIf(runnable)('a layer that a server has by TLS', () => {
  const folder = scratchPath('pki');
  const own = scratchPath('own');
  const other = scratchPath('other');

  beforeAll(async () => {
    await authority(folder);
    await authority(other);
    await certificate(folder, 'server', 'subjectAltName=DNS:disks.example,IP:127.0.0.1');
    await certificate(folder, 'client', 'subjectAltName=DNS:client');
    mkdirSync(own);
    for (const name of ['ca-cert.pem', 'client-cert.pem', 'client-key.pem']) copyFileSync(join(folder, name), join(own, name));
  });

  const words = ['--tls=require', `--tls-certificates=${folder}`, '--tls-verify-peer'];
  const tls = (server: Server, query = '&tls-hostname=disks.example') => `${server.uri.replace('nbd+', 'nbds+')}${query}`;

  it('is copied from by the caller’s certificates', async () => {
    const { files } = await makeBelow('raw', 21);
    const base = files.at(-1)!;
    await using server = await nbdkit(['file', base], ['-r', ...words]);
    const { path, before } = await makeDisk(base, 'raw', tls(server), files);
    const named = [...QCOW2, '--tls-certificates', own];
    const { document } = await cliJson<ImageInfo>(['info', path, ...named]);
    expect(document.backing[0]).toMatchObject({ path: tls(server), format: 'raw', virtualSize: SIZE });
    await allocate(path, ...named, '--offset', '1M', '--length', '3M');
    await allocate(path, ...named, '--preallocation', 'full', '--drop-backing');
    await server.process.dispose();
    await expectSame(path, 'qcow2', before, files);
    await expectOwn(path, 'qcow2', 0, SIZE, true);
  });

  it('may be one on TCP, by the name or the address that its certificate bears', async () => {
    const { files } = await makeBelow('raw', 22);
    const port = await freePort();
    await using _server = await nbdkitOn(port, files[0]!);
    const name = `nbds://127.0.0.1:${port}`;
    const { path, before } = await makeDisk(files[0]!, 'raw', name, files);
    expect((await codeOf(['map', await renamed(path, `nbds://localhost:${port}`), ...QCOW2, '--tls-certificates', own])).code).toBe('BACKING_MISSING');
    await allocate(await renamed(path, name), ...QCOW2, '--tls-certificates', own, '--drop-backing', '--preallocation', 'metadata');
    await expectSame(path, 'qcow2', before, files);
  });

  async function nbdkitOn(port: number, file: string): Promise<AsyncDisposable> {
    const pidfile = scratchPath('pid');
    const process = start('nbdkit', ['-f', '-i', '127.0.0.1', '-p', String(port), '-P', pidfile, '-r', ...words, 'file', file]);
    await waitFor('the server', () => existsSync(pidfile));
    return { [Symbol.asyncDispose]: () => process.dispose() };
  }

  async function renamed(path: string, name: string): Promise<string> {
    await mustRun('qemu-img', ['rebase', '-u', '-f', 'qcow2', '-b', name, '-F', 'raw', path]);
    return path;
  }

  it('is not spoken to without certificates, with others’, nor under another name; and nothing is changed', async () => {
    const { files } = await makeBelow('raw', 23);
    await using server = await nbdkit(['file', files[0]!], ['-r', ...words]);
    const { path } = await makeDisk(files[0]!, 'raw', tls(server), files);
    const sum = await mustRun('sha256sum', [path]);
    const plain = await codeOf(['allocate', path, ...QCOW2]);
    expect(plain).toMatchObject({ code: 'BACKING_REFUSED', message: expect.stringContaining('--tls-certificates') });
    for (const pki of [other, '/nowhere']) {
      expect((await codeOf(['allocate', path, ...QCOW2, '--tls-certificates', pki])).code).toBe('BACKING_MISSING');
    }
    expect(await mustRun('sha256sum', [path])).toBe(sum);
    for (const [query, code] of [['', 'BACKING_MISSING'], ['&tls-hostname=other', 'BACKING_MISSING'], [`&tls-certificates=${own}`, 'BACKING_REFUSED']]) {
      await renamed(path, tls(server, query));
      expect((await codeOf(['allocate', path, ...QCOW2, '--tls-certificates', own])).code, query).toBe(code);
    }
    await expectNothingLeft();
  });
});

describe.runIf(runnable)('a layer whose tables a server has', () => {
  /** To QEMU it may give other tables than to thicken, which name what QEMU opens then. */
  it('is refused before anything is asked of the server', async () => {
    const middle = await makeOverlay({ name: (await makeBelow('raw', 24)).files[0]!, format: 'raw' });
    await using server = await serveFile(middle);
    const path = scratchPath('top.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-u', '-f', 'qcow2', '-b', server.uri, '-F', 'qcow2', path, String(SIZE)]);
    for (const command of ['map', 'info', 'allocate']) {
      const refused = await codeOf([command, path, ...QCOW2]);
      expect(refused, command).toMatchObject({ code: 'UNSUPPORTED', message: expect.stringContaining('raw content') });
    }
  });
});
