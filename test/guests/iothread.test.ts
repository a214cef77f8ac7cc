/** Disks whose I/O runs in a thread of its own, where QEMU 7.2.22 must not meet a closed connection. */
import { describe, expect, it } from 'vitest';
import { makeTemplate } from '../support/guest-content.js';
import { startGuest } from '../support/guest.js';
import { cli } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';
import { allocate, cliJson, expectChecked, MiB, overlayOf, shutDown, withGuest } from './helpers.js';

const SIZE = 64 * MiB;

describe.runIf(withGuest)('a disk with an iothread', () => {
  it('outlives every command', async () => {
    const template = scratchPath('template.raw');
    const base = makeTemplate(template, { size: SIZE, seed: 17 });
    const file = await overlayOf(template);
    await using guest = await startGuest({
      disks: [{ id: 'vda', file, format: 'qcow2', deviceOptions: { iothread: 'io' } }],
      extraArgs: ['-object', 'iothread,id=io'],
    });
    await guest.base(base);
    const disk = ['--qmp', guest.qmpSocket, '--device', 'vda'];
    for (const command of ['info', 'map']) expect((await cliJson([command, ...disk])).status).toBe(0);
    expect((await cli(['verify', ...disk, '--preallocation', 'metadata'])).status).toBe(3);
    await guest.command('churn 1 2');
    for (const options of [['--dry-run'], ['--length', '4M'], [], ['--drop-backing']]) {
      await allocate(guest.qmpSocket, 'vda', ...options);
    }
    expect(await guest.ask('stop')).toMatchObject({ errors: 0, failed: 0 });
    expect(await guest.ask('verify')).toMatchObject({ errors: 0, unknown: 0 });
    await shutDown(guest);
    await expectChecked(file, 'qcow2');
  });
});
