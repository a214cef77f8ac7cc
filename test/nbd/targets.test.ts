/** Exports of NBD servers as targets. */
import { copyFileSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { open } from '../../lib/index.js';
import type { ImageInfo, MapEntry, Verdict } from '../../lib/types.js';
import { bytesOf, cliJson, missing } from '../storage/helpers.js';
import { random } from '../support/patterns.js';
import { cli, mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { authority, certificate } from './certificates.js';
import { nbdinfoMap, nbdkit, qemuNbd, type Server } from './servers.js';
import { allocateExport, expectSame, holesOf, imageOf, KiB, MiB, refusalOf, SIZE } from './targets.js';

const TOOLS = ['qemu-img', 'qemu-nbd', 'nbdkit', 'nbdinfo', 'filefrag', 'cp', 'sync'];
const runnable = requires({ tools: TOOLS });

const POLICY = ['blocksize-minimum=4096', 'blocksize-preferred=65536', 'blocksize-maximum=128K', 'blocksize-error-policy=error'];

interface Served {
  name: string;
  format: 'raw' | 'qcow2';
  serve(path: string): Promise<Server>;
  /** Whether the server can be told to allocate. */
  tells: boolean;
  /** Bytes that requests are widened to. */
  unit: number;
}

const SERVERS: Served[] = [
  { name: 'qemu-nbd of a raw file', format: 'raw', serve: (path) => qemuNbd(path, 'raw'), tells: true, unit: 4 * KiB },
  { name: 'qemu-nbd of a qcow2 file', format: 'qcow2', serve: (path) => qemuNbd(path, 'qcow2'), tells: true, unit: 4 * KiB },
  { name: 'nbdkit of a file', format: 'raw', serve: (path) => nbdkit(['file', path]), tells: true, unit: 4 * KiB },
  {
    name: 'nbdkit with narrow block sizes',
    format: 'raw',
    serve: (path) => nbdkit(['file', path, ...POLICY], ['--filter=blocksize-policy']),
    tells: true,
    unit: 64 * KiB,
  },
  { name: 'nbdkit without write zeroes', format: 'raw', serve: (path) => nbdkit(['file', path], ['--filter=nozero']), tells: false, unit: 4 * KiB },
];

/** The whole, and three ranges that begin and end anywhere. */
function ranges(seed: number): ([number, number] | null)[] {
  const next = random(seed);
  const some = Array.from({ length: 3 }, (): [number, number] => {
    const offset = next() % (SIZE - 1);
    return [offset, 1 + (next() % (SIZE - offset))];
  });
  return [null, ...some];
}

describe.runIf(runnable).each(SERVERS)('$name', ({ format, serve, tells, unit }) => {
  const seed = SERVERS.findIndex((server) => server.serve === serve) + 1;

  test.each(ranges(seed).map((range) => [range] as const))('gets storage behind its holes, range %j', async (range) => {
    const [offset, length] = range ?? [0, SIZE];
    for (const level of ['falloc', 'full'] as const) {
      const { path, copy } = await imageOf(format);
      await using server = await serve(path);
      const result = await allocateExport(server.uri, '--preallocation', level, '--offset', String(offset), '--length', String(length));
      const from = offset - (offset % unit);
      const to = Math.min(SIZE, Math.ceil((offset + length) / unit) * unit);
      expect(result.effective).toEqual({ offset: from, length: to - from });
      expect(result.plan.every(({ route }) => route === 'nbd-write')).toBe(true);
      const written = level === 'full' || !tells;
      expect(result.verified).toBe(written ? true : null);
      expect(result.guarantee).toBe(false);
      const warnings = result.warnings.join('\n');
      expect(warnings).toMatch(/no guarantee: only the server/);
      if (!written) expect(warnings).toMatch(/still calls \d+ bytes holes .*--preallocation full/);
      if (written) expect(await holesOf(server.uri, from, to - from)).toBe(0);
      if (format === 'raw') expect(await missing(path, written ? 'full' : 'falloc', { offset: from, length: to - from })).toEqual([]);
      await server[Symbol.asyncDispose]();
      await expectSame(path, format, copy);
      if (format === 'qcow2') await mustRun('qemu-img', ['check', '-q', path]);
      // Nothing beside the range was touched.
      if (format === 'raw') expect(await outside(path, from, to)).toEqual(await outside(copy, from, to));
    }
  });

  test('is told of by info and map as by nbdinfo', async () => {
    const { path } = await imageOf(format);
    await using server = await serve(path);
    const info = await cliJson<ImageInfo>(['info', server.uri]);
    const holes = await holesOf(server.uri);
    expect(info.status, info.stderr).toBe(0);
    expect(info.document).toMatchObject({
      ...{ target: server.uri, kind: 'nbd', format: 'raw', virtualSize: SIZE, fileSize: null, inUse: null },
      ...{ missing: holes, allocated: SIZE - holes, granularity: unit, filesystem: null },
    });
    const map = await cliJson<MapEntry[]>(['map', server.uri]);
    const expected = await nbdinfoMap(server.uri, 'base:allocation');
    const merged = expected.filter(({ type }, i) => type !== expected[i - 1]?.type);
    expect(map.document.map(({ start, host, zero }) => [start, host, zero])).toEqual(
      merged.map(({ offset, type }) => [offset, type & 1 ? 'hole' : 'unknown', (type & 2) !== 0]),
    );
    const verdict = await cliJson<Verdict>(['verify', server.uri]);
    expect([verdict.status, verdict.document.satisfied, bytesOf(verdict.document.missing)]).toEqual([3, false, holes]);
  });
});

function outside(path: string, from: number, to: number) {
  return Promise.all([
    missing(path, 'falloc', { offset: 0, length: from }),
    missing(path, 'falloc', { offset: to, length: SIZE - to }),
  ]);
}

describe.runIf(runnable)('an export', () => {
  test('is not written to without --exclusive', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await qemuNbd(path, 'raw');
    const { error } = await refusalOf(['allocate', server.uri], 4);
    expect(error).toMatchObject({ code: 'IN_USE', message: expect.stringMatching(/NBD has no lock.*--exclusive/) });
    expect(await missing(path, 'falloc')).toEqual(await missing(copy, 'falloc'));
    // What changes nothing needs no such word.
    expect((await cli(['allocate', '--dry-run', server.uri])).status).toBe(0);
  });

  test('that is read-only can be looked at', async () => {
    const { path } = await imageOf('raw');
    await using server = await qemuNbd(path, 'raw', ['-r']);
    const { error } = await refusalOf(['allocate', '--exclusive', server.uri], 1);
    expect(error).toMatchObject({ code: 'UNSUPPORTED', message: expect.stringMatching(/read-only/) });
    const { document } = await cliJson<ImageInfo>(['info', server.uri]);
    expect(document.warnings.join('\n')).toMatch(/read-only/);
  });

  test('whose bytes look like another format is taken for raw on the caller’s word alone', async () => {
    const { path } = await imageOf('qcow2');
    await using server = await qemuNbd(path, 'raw');
    expect((await refusalOf(['allocate', '--exclusive', server.uri], 2)).error.code).toBe('FORMAT_REQUIRED');
    expect((await refusalOf(['allocate', '--exclusive', '--format', 'qcow2', server.uri], 1)).error.code).toBe('UNSUPPORTED');
    expect((await cliJson<ImageInfo>(['info', server.uri])).document).toMatchObject({ format: 'qcow2', formatBy: 'probe' });
    await allocateExport(server.uri, '--format', 'raw');
  });

  test.each([
    [['--preallocation', 'metadata'], 'USAGE'],
    [['--route', 'fallocate'], 'USAGE'],
    [['--offset', '1T'], 'RANGE'],
  ])('refuses %j', async (args, code) => {
    await using server = await nbdkit(['memory', '1M']);
    expect((await refusalOf(['allocate', '--exclusive', server.uri, ...args], 2)).error.code).toBe(code);
  });

  test('of no bytes, or of few, is dealt with', async () => {
    for (const size of ['0', '512', '1000']) {
      await using server = await nbdkit(['memory', size], ['--filter=nozero']);
      const result = await allocateExport(server.uri);
      expect(result.effective).toEqual({ offset: 0, length: Number(size) });
      expect(result.allocated).toBe(Number(size));
    }
  });

  test('whose server allocates in memory shows it', async () => {
    await using server = await nbdkit(['memory', '16M']);
    const result = await allocateExport(server.uri, '--preallocation', 'full', '--offset', '1M', '--length', '10M');
    expect(result).toMatchObject({ verified: true, allocated: 10 * MiB, before: { allocated: 0 }, after: { allocated: 10 * MiB } });
    expect(await holesOf(server.uri)).toBe(6 * MiB);
    // The map says zeros, and allocated: nothing is left to do.
    expect(await allocateExport(server.uri, '--preallocation', 'full', '--length', '11M')).toMatchObject({ allocated: MiB });
  });
});

describe.runIf(runnable)('a map', () => {
  test('that is missing has all looked at that is to be allocated', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await nbdkit(['file', path], ['--no-sr']);
    expect((await cliJson<ImageInfo>(['info', server.uri])).document).toMatchObject({ allocated: null, missing: null });
    const result = await allocateExport(server.uri);
    expect(result).toMatchObject({ verified: null, before: { allocated: null }, after: { allocated: null } });
    expect(result.warnings.join('\n')).toMatch(/no map/);
    expect(await missing(path, 'falloc')).toEqual([]);
    await expectSame(path, 'raw', copy);
  });

  test('that calls all allocated is no proof, and can be passed over', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await nbdkit(['file', path], ['--filter=noextents']);
    const nothing = await allocateExport(server.uri);
    expect(nothing).toMatchObject({ verified: null, allocated: 0 });
    expect(nothing.warnings.join('\n')).toMatch(/shows no hole.*--route nbd-write/);
    expect(await missing(path, 'falloc')).not.toEqual([]);
    const result = await allocateExport(server.uri, '--route', 'nbd-write', '--preallocation', 'full');
    expect(result).toMatchObject({ verified: null, guarantee: false });
    expect(await missing(path, 'full')).toEqual([]);
    await expectSame(path, 'raw', copy);
  });

  test('that does not change after zeros were written is told of', async () => {
    await using server = await nbdkit(['null', '8M']);
    const result = await allocateExport(server.uri, '--preallocation', 'full');
    expect(result).toMatchObject({ verified: false, guarantee: false, after: { allocated: 0 } });
    expect(result.warnings.join('\n')).toMatch(/keeps no zeros/);
  });

  test('that calls data a hole costs no data', async () => {
    const { path, copy } = await imageOf('raw');
    const list = scratchPath('extents');
    await mustRun('sh', ['-c', `echo 0 ${SIZE} hole,zero > ${list}`]);
    for (const level of ['falloc', 'full']) {
      await using server = await nbdkit(['file', path, `extentlist=${list}`], ['--filter=extentlist']);
      const result = await allocateExport(server.uri, '--preallocation', level);
      if (level === 'falloc') expect(result.skipped).toBeGreaterThan(MiB);
      await expectSame(path, 'raw', copy);
    }
    expect(await missing(path, 'full')).toEqual([]);
  });

  test('of holes that may read as anything has them read first', async () => {
    const { path, copy } = await imageOf('raw');
    const list = scratchPath('extents');
    await mustRun('sh', ['-c', `echo 0 ${SIZE} hole > ${list}`]);
    await using server = await nbdkit(['file', path, `extentlist=${list}`], ['--filter=extentlist']);
    await allocateExport(server.uri, '--preallocation', 'full');
    await expectSame(path, 'raw', copy);
    expect(await missing(path, 'full')).toEqual([]);
  });
});

describe.runIf(runnable)('from a program', () => {
  test('an export is an image like any other', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await qemuNbd(path, 'raw');
    await using image = await open(server.uri);
    expect([image.kind, image.size, image.path]).toEqual(['nbd', SIZE, server.uri]);
    const job = image.allocate({ preallocation: 'full', exclusive: true, iops: 1000 });
    const positions: number[] = [];
    job.on('progress', ({ position, route }) => positions.push(route === 'nbd-write' ? position : -1));
    const result = await job.result;
    expect(result.verified).toBe(true);
    expect(positions.at(-1)).toBe(result.allocated);
    await expectSame(path, 'raw', copy);
  });

  test('a limit of speed is held', async () => {
    await using server = await nbdkit(['memory', '8M']);
    await using image = await open(server.uri);
    const { seconds } = await image.allocate({ preallocation: 'full', exclusive: true, speed: 4 * MiB }).result;
    // The first chunk goes at once.
    expect(seconds).toBeGreaterThan(1.5);
  });
});

describe.runIf(runnable && requires({ tools: ['openssl'] }))('through TLS', () => {
  const folder = scratchPath('pki');
  const own = scratchPath('own');

  beforeAll(async () => {
    await authority(folder);
    await certificate(folder, 'server', 'subjectAltName=DNS:localhost');
    await certificate(folder, 'client', 'subjectAltName=DNS:client');
    mkdirSync(own);
    for (const name of ['ca-cert.pem', 'client-cert.pem', 'client-key.pem']) copyFileSync(join(folder, name), join(own, name));
  });

  test('an export is allocated with the certificates of its URI, or of the program', async () => {
    const { path, copy } = await imageOf('raw');
    await using server = await nbdkit(['file', path], ['--tls=require', `--tls-certificates=${folder}`, '--tls-verify-peer']);
    expect((await refusalOf(['info', server.uri], 1)).error.code).toBe('NBD_REFUSED');
    const uri = server.uri.replace('nbd+', 'nbds+');
    const result = await allocateExport(`${uri}&tls-certificates=${own}`, '--length', '4M', '--preallocation', 'full');
    expect(result.verified).toBe(true);
    const pem = (name: string) => readFileSync(join(own, name));
    const tls = { ca: pem('ca-cert.pem'), cert: pem('client-cert.pem'), key: pem('client-key.pem') };
    const named = await cliJson<ImageInfo>(['info', uri, '--tls-certificates', own]);
    expect(named.document).toMatchObject({ target: uri, kind: 'nbd' });
    await using image = await open(uri, { tls });
    expect((await image.allocate({ exclusive: true, preallocation: 'full' }).result).verified).toBe(true);
    await expectSame(path, 'raw', copy);
    expect(await missing(path, 'full')).toEqual([]);
  });
});
