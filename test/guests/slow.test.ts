/** How long a guest's writes wait beside a populate over a template that is slow to read. */
import { describe, expect, it } from 'vitest';
import { nbdkit } from '../nbd/servers.js';
import { makeTemplate } from '../support/guest-content.js';
import { startGuest } from '../support/guest.js';
import { scratchPath } from '../support/scratch.js';
import {
  allocate,
  besideWrites,
  expectWritten,
  MiB,
  overlayOf,
  ownRanges,
  soak,
  withGuest,
  withNbdkit,
} from './helpers.js';

const SIZE = soak ? 512 * MiB : 48 * MiB;
/** 20 MB a second, which nbdkit wants in bits; no burst worth the name. */
const SLOW = ['rate=160M', 'burstiness=0.05'];

describe.runIf(withGuest && withNbdkit)('a guest over a slow template', () => {
  it('goes on writing while the disk is populated', async () => {
    const template = scratchPath('template.raw');
    const base = makeTemplate(template, { size: SIZE, seed: 7 });
    await using server = await nbdkit(['file', template, ...SLOW], ['--filter=rate', '--filter=noextents']);
    const file = await overlayOf(server.uri);
    await using guest = await startGuest({
      disks: [{ id: 'vda', file, format: 'qcow2', cacheDirect: true }],
    });
    await guest.base(base);
    await besideWrites(guest, 'a populate at 20 MB/s', soak ? 60 : 8, async () => {
      expect(await allocate(guest.qmpSocket, 'vda')).toMatchObject({ verified: true });
    });
    expect(await guest.ask('verify')).toMatchObject({ errors: 0, unknown: 0 });
    await expectWritten(guest, file, SIZE, base);
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
  }, 240_000);
});
