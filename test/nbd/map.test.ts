import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, NbdClient } from '../../lib/nbd/client.js';
import { statusPages, type StatusStreamOptions } from '../../lib/nbd/status-stream.js';
import type { ByteRange } from '../../lib/types.js';
import { makePattern, random, type Segment } from '../support/patterns.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { nbdinfoMap, nbdkit, qemuNbd, storageDaemon, type InfoExtent, type Server } from './servers.js';

const MiB = 2 ** 20;
const CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH];

/** Neighbours that tell the same are one, since servers cut where they like. */
function merged(extents: readonly InfoExtent[]): InfoExtent[] {
  const list: InfoExtent[] = [];
  for (const { offset, length, type } of extents) {
    const last = list.at(-1);
    if (last?.type === type) last.length += length;
    else list.push({ offset, length, type });
  }
  return list;
}

async function mapOf(
  client: NbdClient,
  context: string,
  range: ByteRange = { offset: 0, length: client.size },
  options: StatusStreamOptions = {},
): Promise<InfoExtent[]> {
  const found: InfoExtent[] = [];
  for await (const { offset, length, flags } of statusPages(client, range, { ...options, contexts: [context] })) {
    expect(length.length).toBeGreaterThan(0);
    offset.forEach((start, i) => found.push({ offset: start, length: length[i]!, type: flags[0]![i]! }));
  }
  return found;
}

/** Random numbers below `most`. */
function below(seed: number): (most: number) => number {
  const next = random(seed);
  return (most) => next() % most;
}

async function rawImage(seed: number): Promise<string> {
  const pick = below(seed);
  const segments: Segment[] = Array.from({ length: 300 }, (_, i) => ({
    kind: i % 2 ? 'hole' : 'data',
    length: 4096 * (1 + pick(pick(3) === 0 ? 2000 : 8)),
  }));
  const path = scratchPath('image.raw');
  await makePattern(path, segments, seed);
  return path;
}

async function qcow2Chain(seed: number): Promise<string> {
  const pick = below(seed);
  let top: string | undefined;
  for (let layer = 0; layer < 3; layer++) {
    const path = scratchPath('layer.qcow2');
    const backing = top === undefined ? [] : ['-b', top, '-F', 'qcow2'];
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, path, '256M']);
    const writes = Array.from({ length: 60 }, () => {
      const place = `${pick(4000) * 65536} ${(1 + pick(20)) * 4096}`;
      return ['-c', pick(5) === 0 ? `write -z ${place}` : `write -P ${1 + pick(250)} ${place}`];
    });
    await mustRun('qemu-io', [...writes.flat(), path]);
    top = path;
  }
  return top!;
}

const SERVERS: [string, string[], (seed: number) => Promise<Server>, string[]][] = [
  ['qemu-nbd of a raw file', ['qemu-nbd'], async (seed) => qemuNbd(await rawImage(seed), 'raw'), CONTEXTS],
  ['qemu-nbd of a qcow2 chain', ['qemu-nbd', 'qemu-io'], async (seed) => qemuNbd(await qcow2Chain(seed), 'qcow2'), CONTEXTS],
  ['a storage daemon', ['qemu-storage-daemon', 'qemu-io'], async (seed) => storageDaemon(await qcow2Chain(seed), 'qcow2'), CONTEXTS],
  ['nbdkit of a raw file', ['nbdkit'], async (seed) => nbdkit(['file', await rawImage(seed)]), [BASE_ALLOCATION]],
  ['nbdkit, an extent at a time', ['nbdkit'], async (seed) => nbdkit(['sparse-random', '256M', `seed=${seed}`, 'runlength=65536']), [BASE_ALLOCATION]],
];

describe.each(SERVERS)('%s', (_, tools, start, contexts) => {
  describe.runIf(requires({ tools: ['nbdinfo', ...tools] }))('is told of as nbdinfo does', () => {
    test.each([1, 2, 3])('pattern %i', async (seed) => {
      await using server = await start(seed);
      await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
      expect(client.contexts).toEqual(contexts);
      for (const context of contexts) {
        const expected = merged(await nbdinfoMap(server.uri, context));
        // A raw image has one depth throughout.
        if (context === BASE_ALLOCATION) expect(expected.length).toBeGreaterThan(1);
        expect(await mapOf(client, context)).toEqual(expected);
        expect(await mapOf(client, context, undefined, { step: 3 * MiB, lanes: 7 })).toEqual(expected);
      }
    });
  });
});

/** An entry of its mapping table, at 60 MiB, points to no whole cluster. */
async function brokenImage(): Promise<string> {
  const path = scratchPath('broken.qcow2');
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', path, '64M']);
  await mustRun('qemu-io', ['-f', 'qcow2', '-c', 'write -P 5 0 64M', path]);
  const file = openSync(path, 'r+');
  const word = Buffer.alloc(8);
  const read = (at: number) => (readSync(file, word, 0, 8, at), Number(word.readBigUInt64BE() & 0x00ff_ffff_ffff_fe00n));
  const entry = read(read(40)) + (60 * MiB) / 65536 * 8;
  readSync(file, word, 0, 8, entry);
  word.writeBigUInt64BE(word.readBigUInt64BE() | 0x1200n);
  writeSync(file, word, 0, 8, entry);
  closeSync(file);
  return path;
}

describe.runIf(requires({ tools: ['qemu-storage-daemon', 'qemu-io'] }))('a status that QEMU can’t tell', () => {
  test('is its error, though QEMU ends the reply once for each context', async () => {
    await using server = await storageDaemon(await brokenImage(), 'qcow2');
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    // QEMU has marked the image as corrupt by then, and reads no more of it: but it goes on answering.
    for (let i = 0; i < 5; i++) {
      const asked = [client.blockStatus(56 * MiB, 8 * MiB), client.read(60 * MiB, 4096), client.blockStatus(60 * MiB, MiB)];
      for (const outcome of await Promise.allSettled(asked)) {
        expect(outcome).toMatchObject({ reason: { code: expect.stringMatching(/^(EINVAL|EIO)$/) as string } });
      }
    }
  });
});

describe.runIf(requires({ tools: ['qemu-nbd', 'qemu-io'] }))('pages of status', () => {
  test('join contexts so that each extent has one number of each', async () => {
    await using server = await qemuNbd(await qcow2Chain(9), 'qcow2');
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    const alone = await Promise.all(CONTEXTS.map((context) => mapOf(client, context)));
    const together: InfoExtent[][] = [[], []];
    let end = 0;
    for await (const { offset, length, flags } of statusPages(client, { offset: 0, length: client.size })) {
      offset.forEach((start, i) => {
        expect(start).toBe(end);
        end += length[i]!;
        flags.forEach((list, k) => together[k]!.push({ offset: start, length: length[i]!, type: list[i]! }));
      });
    }
    expect(end).toBe(client.size);
    expect(together.map(merged)).toEqual(alone);
  });

  test('of a part are that part of the whole, at any byte', async () => {
    const sizes = ['blocksize-minimum=4096', 'blocksize-preferred=4096', 'blocksize-maximum=1M', 'blocksize-error-policy=error'];
    await using server = await nbdkit(['file', await rawImage(5), ...sizes], ['--filter=blocksize-policy']);
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    const whole = await mapOf(client, BASE_ALLOCATION);
    const pick = below(77);
    for (let i = 0; i < 50; i++) {
      const offset = pick(client.size - 1);
      const length = 1 + pick(Math.min(client.size - offset, 10 * MiB));
      const part = whole
        .map((e) => {
          const start = Math.max(e.offset, offset);
          return { ...e, offset: start, length: Math.min(e.offset + e.length, offset + length) - start };
        })
        .filter((e) => e.length > 0);
      expect(await mapOf(client, BASE_ALLOCATION, { offset, length })).toEqual(part);
    }
    expect(await mapOf(client, BASE_ALLOCATION, { offset: 5, length: 0 })).toEqual([]);
  });

  test('of more than 4 GiB come from several requests, as one extent where they are one', async () => {
    const path = scratchPath('large.raw');
    await makePattern(path, [{ kind: 'hole', length: 40 * 2 ** 30 }, { kind: 'data', length: 4096 }, { kind: 'hole', length: MiB }]);
    await using server = await qemuNbd(path, 'raw');
    await using client = await NbdClient.connect(server.uri, { metaContexts: CONTEXTS });
    expect(await mapOf(client, BASE_ALLOCATION)).toEqual([
      { offset: 0, length: 40 * 2 ** 30, type: 3 },
      { offset: 40 * 2 ** 30, length: 4096, type: 0 },
      { offset: 40 * 2 ** 30 + 4096, length: MiB, type: 3 },
    ]);
  });

  test('may be left early, cancelled, or asked for a context that is not there', async () => {
    await using server = await qemuNbd(await rawImage(3), 'raw');
    await using client = await NbdClient.connect(server.uri, { metaContexts: [BASE_ALLOCATION] });
    for await (const page of statusPages(client, { offset: 0, length: client.size }, { step: MiB })) {
      expect(page.offset[0]).toBe(0);
      break;
    }
    const signal = AbortSignal.abort();
    const all = { offset: 0, length: client.size };
    await expect(statusPages(client, all, { signal }).next()).rejects.toMatchObject({ code: 'CANCELLED' });
    const later = new AbortController();
    const pages = statusPages(client, all, { signal: later.signal, step: MiB, lanes: 1 });
    await pages.next();
    later.abort();
    await expect(pages.next()).rejects.toMatchObject({ code: 'CANCELLED' });
    const missing = statusPages(client, all, { contexts: [ALLOCATION_DEPTH] }).next();
    await expect(missing).rejects.toMatchObject({ code: 'ENOTSUP', message: expect.stringContaining(ALLOCATION_DEPTH) });
    expect((await client.read(0, 512)).length).toBe(512);
  });
});
