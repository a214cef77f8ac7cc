/** QEMU 7.2 ends by an assertion when an NBD client of a disk with an iothread goes. */
import { describe, expect, it } from 'vitest';
import { QmpClient } from '../../lib/qmp/client.js';
import { makeTemplate } from '../support/guest-content.js';
import { startGuest } from '../support/guest.js';
import { cli } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';
import { MiB, overlayOf, withGuest } from './helpers.js';

describe.runIf(withGuest)('a disk whose requests run in an iothread', () => {
  it('is refused by name on a QEMU that would not survive it; one beside it is not', async () => {
    const template = scratchPath('template.raw');
    makeTemplate(template, { size: 16 * MiB, seed: 1 });
    const [first, second] = [await overlayOf(template), await overlayOf(template)];
    await using guest = await startGuest({
      disks: [
        { id: 'vda', file: first, format: 'qcow2', deviceOptions: { iothread: 'io' } },
        { id: 'vdb', file: second, format: 'qcow2' },
      ],
      extraArgs: ['-object', 'iothread,id=io'],
    });
    await using client = await QmpClient.connect(guest.spareQmp);
    const { qemu } = await client.execute('query-version');
    const on = (device: string) => cli(['allocate', '--qmp', guest.qmpSocket, '--device', device]);
    const refused = await on('vda');
    if (qemu.major < 9) {
      expect(refused.status).toBe(1);
      expect(refused.stderr).toMatch(/^thicken: UNSUPPORTED: .*iothread/);
    }
    expect(await on('vdb')).toMatchObject({ status: 0 });
    expect(await client.execute('query-status')).toMatchObject({ running: true });
  });
});
