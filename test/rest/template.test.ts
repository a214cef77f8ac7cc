/** A disk made of a template on a server, until it needs the server no more. */
import { describe, expect, it } from 'vitest';
import { startGuest } from '../support/guest.js';
import { makeTemplate } from '../support/guest-content.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { MiB } from '../storage/helpers.js';
import { serveFile } from '../nbd/servers.js';
import { allocate, expectOwn, makeOverlay } from './disks.js';
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
