/** A disk made of a template on a server, until it needs the server no more. */
import { statSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { open, type ThickenError } from '../../lib/index.js';
import { startGuest } from '../support/guest.js';
import { makeTemplate } from '../support/guest-content.js';
import { mustRun } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { cliJson, MiB, type Refusal } from '../storage/helpers.js';
import { serveFile } from '../nbd/servers.js';
import { allocate, expectOwn, expectSame, lookBefore, makeOverlay } from './disks.js';
import { expectNothingLeft, withDaemon } from './helpers.js';

const SIZE = 48 * MiB;
const runnable = withDaemon && requires({ guest: true, tools: ['nbdkit'] });

describe.runIf(runnable)('an overlay over a template on a server', () => {
  it('is given storage for all of it, and boots a guest without the server', async () => {
    const template = scratchPath('template.raw');
    const base = makeTemplate(template, { size: SIZE, seed: 23 });
    const server = await serveFile(template);
    const path = await makeOverlay({ name: server.uri, format: 'raw' });
    const words = ['--format', 'qcow2', '--preallocation', 'full', '--drop-backing'];
    const result = await allocate(path, ...words);
    expect(result).toMatchObject({ verified: true, guarantee: true, after: { allocated: SIZE } });
    expect(new Set(result.plan.map(({ route }) => route))).toEqual(new Set(['populate', 'stream', 'qcow2']));
    await server.process.dispose();
    await mustRun('rm', [template]);
    await expectNothingLeft();
    await expectOwn(path, 'qcow2', 0, SIZE, true);

    await using guest = await startGuest({ disks: [{ id: 'vda', file: path, format: 'qcow2' }] });
    await guest.waitReady();
    await guest.base(base);
    expect(await guest.ask('verify')).toMatchObject({ errors: 0, unknown: 0, blocks: SIZE / 4096 });
    expect(await guest.powerOff(), guest.console()).toMatchObject({ status: 0 });
    await mustRun('qemu-img', ['check', '-f', 'qcow2', path]);
  });
});

describe.runIf(withDaemon && requires({ tools: ['nbdkit'] }))('a server that takes little at a time', () => {
  const size = 24 * MiB;
  /** As nbdkit has it. */
  const policy = (maximum: string) => ['blocksize-minimum=1', 'blocksize-preferred=4096', `blocksize-maximum=${maximum}`];

  async function served(maximum: string, options: string[]) {
    const template = scratchPath('template.raw');
    await mustRun('qemu-img', ['create', '-q', '-f', 'raw', template, String(size)]);
    await qemuIo(template, 'raw', 'write -q -P 7 0 9M', 'write -q -P 8 11M 300k', 'write -q -P 9 20M 4M');
    const server = await serveFile(template, ['blocksize-policy'], policy(maximum));
    return { server, template, path: await makeOverlay({ name: server.uri, format: 'raw' }, 'qcow2', options) };
  }

  it.each([
    ['4M', 'cluster_size=64k'],
    ['1M', 'cluster_size=64k'],
    ['64k', 'cluster_size=4k'],
    ['256k', 'cluster_size=2M'],
    ['1M', 'cluster_size=64k,extended_l2=on'],
  ])('of %s is asked for no more (%s)', async (maximum, options) => {
    const { server, template, path } = await served(maximum, ['-o', options]);
    await qemuIo(path, 'qcow2', 'write -q -P 3 5M 100k', 'write -q -z 8M 40k', 'write -q -P 4 21500k 4k');
    const before = await lookBefore(path, 'qcow2', [template]);
    const words = ['--format', 'qcow2', '--preallocation', 'metadata'];
    await allocate(path, ...words, '--offset', '5M', '--length', '4M');
    await expectOwn(path, 'qcow2', 5 * MiB, 9 * MiB);
    expect(await allocate(path, ...words, '--drop-backing')).toMatchObject({ verified: true });
    await server.process.dispose();
    await expectSame(path, 'qcow2', before, [template]);
    await expectOwn(path, 'qcow2', 0, size);
  });

  it('is refused where QEMU could not copy a part of a cluster', async () => {
    const { server, template, path } = await served('64k', ['-o', 'cluster_size=2M,extended_l2=on']);
    await qemuIo(path, 'qcow2', 'write -q -P 3 8M 64k');
    const before = await lookBefore(path, 'qcow2', [template]);
    const words = ['allocate', path, '--format', 'qcow2', '--preallocation', 'metadata'];
    const refused = await cliJson<Refusal>(words);
    expect(refused).toMatchObject({ status: 1, document: { error: { code: 'UNSUPPORTED' } } });
    await expectSame(path, 'qcow2', before, [template]);
    await server.process.dispose();
  });
});

describe.runIf(withDaemon && requires({ tools: ['nbdkit'] }))('a cancel of a copy from a slow template', () => {
  it('waits for a small part of what is left', async () => {
    const template = scratchPath('template.raw');
    await mustRun('qemu-img', ['create', '-q', '-f', 'raw', template, String(SIZE)]);
    await qemuIo(template, 'raw', `write -q -P 5 0 ${SIZE}`);
    // 8 MB a second, which nbdkit wants in bits; a burst as large as a chunk, for which it would wait in vain.
    const server = await serveFile(template, ['rate'], ['rate=64M', 'burstiness=0.6']);
    const path = await makeOverlay({ name: server.uri, format: 'raw' });
    const image = await open(path, { format: 'qcow2' });
    const job = image.allocate({ preallocation: 'metadata' });
    let told = 0;
    job.on('progress', ({ position }) => {
      if (position < 6 * MiB) return;
      told ||= position;
      job.cancel();
    });
    const error = await job.result.catch((reason: unknown) => reason);
    expect(error).toMatchObject({ code: 'CANCELLED' });
    // Two or three chunks are under way, and not eight.
    expect((error as ThickenError).done!.allocated - told).toBeLessThan(16 * MiB);
    await image.close();
    await server.process.dispose();
  });
});

describe.runIf(withDaemon)('zeros that a template has written', () => {
  it('take no storage where 4 MiB of them are copied', async () => {
    const template = scratchPath('template.raw');
    const size = 32 * MiB;
    await mustRun('qemu-img', ['create', '-q', '-f', 'raw', template, String(size)]);
    const zeros = Array.from({ length: size / MiB / 8 }, (_, i) => `write -q -P 0 ${8 * i + 4}M 4M`);
    await qemuIo(template, 'raw', `write -q -P 5 0 ${size}`, ...zeros);
    const path = await makeOverlay({ name: template, format: 'raw' });
    await allocate(path, '--format', 'qcow2', '--preallocation', 'metadata');
    // Half of it, and the tables.
    expect(statSync(path).blocks * 512).toBeLessThan(size / 2 + MiB);
  });
});
