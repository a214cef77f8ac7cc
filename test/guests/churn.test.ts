/** A guest that writes and verifies all over its disk while the disk is populated, range by range. */
import { describe, expect, it } from 'vitest';
import { makeTemplate } from '../support/guest-content.js';
import { startGuest, type Guest } from '../support/guest.js';
import { random } from '../support/patterns.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import {
  allocate,
  expectWritten,
  KiB,
  MiB,
  overlayOf,
  ownRanges,
  shuffled,
  soak,
  withGuest,
} from './helpers.js';

const SIZE = soak ? 128 * MiB : 32 * MiB;
const SEEDS = Array.from({ length: soak ? 20 : 1 }, (_, i) => i + 1);

/** Cuts the disk anywhere, in no order. */
function rangesOf(next: () => number): { offset: number; length: number }[] {
  const ranges = [];
  for (let offset = 0; offset < SIZE; ) {
    const length = Math.min(SIZE - offset, 1 + (next() % Math.floor(SIZE / 6)));
    ranges.push({ offset, length });
    offset += length;
  }
  return shuffled(ranges, next);
}

async function busy(guest: Guest): Promise<void> {
  await waitFor('the guest to write and read', async () => {
    const { writes = 0, reads = 0 } = await guest.ask('status');
    return writes > 50 && reads > 50;
  }, { timeout: 100_000, interval: 50 });
}

describe.runIf(withGuest)('under a guest that writes and verifies', () => {
  it.each(SEEDS)('the disk is populated in random order (seed %i)', async (seed) => {
    const template = scratchPath('template.raw');
    const base = makeTemplate(template, { size: SIZE, seed, region: (1 + (seed % 5)) * 68 * KiB });
    const file = await overlayOf(template);
    await using guest = await startGuest({
      disks: [{
        id: 'vda',
        file,
        format: 'qcow2',
        cacheDirect: seed % 2 === 0,
      }],
    });
    await guest.base(base);
    await guest.command(`churn ${seed} 4`);
    await busy(guest);
    for (const { offset, length } of rangesOf(random(seed))) {
      const range = ['--offset', String(offset), '--length', String(length)];
      expect(await allocate(guest.qmpSocket, 'vda', ...range)).toMatchObject({ verified: true });
    }
    expect(await guest.ask('status')).toMatchObject({ running: 1, errors: 0, failed: 0 });
    expect(await allocate(guest.qmpSocket, 'vda')).toMatchObject({ allocated: 0, skipped: SIZE });
    expect(await guest.ask('stop')).toMatchObject({ errors: 0, failed: 0 });
    expect(await guest.ask('verify')).toMatchObject({ blocks: SIZE / 4096, errors: 0, unknown: 0 });
    await expectWritten(guest, file, SIZE, base);
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
  }, 240_000);
});
