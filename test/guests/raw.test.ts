/** Raw disks of running QEMUs: the file that QEMU has open gets its blocks from the file system. */
import { renameSync, writeFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { startGuest } from '../support/guest.js';
import { makePattern, segmentsChecksum, totalLength, type Segment } from '../support/patterns.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { missing, mixedSegments } from '../storage/helpers.js';
import {
  allocate,
  allocateAny,
  besideWrites,
  cliJson,
  diskArgs,
  KiB,
  MiB,
  shutDown,
  soak,
  startMachine,
  withGuest,
  withQemu,
  type Refusal,
} from './helpers.js';

const tools = requires({ tools: ['filefrag', 'xfs_io', 'fallocate'] });

const GAPS = soak ? 100_000 : 5_000;
/** At the end, for the guest to write to. */
const ROOM = 16 * MiB;

function manyGaps(): Segment[] {
  const pairs = Array.from({ length: GAPS }, (): Segment[] => [
    { kind: 'data', length: 4 * KiB },
    { kind: 'hole', length: 4 * KiB },
  ]);
  const rest = MiB - ((GAPS * 8 * KiB) % MiB);
  return [...pairs.flat(), { kind: 'hole', length: rest + ROOM }];
}

describe.runIf(withGuest && tools)('a raw disk of a running guest', () => {
  it(`is allocated through ${GAPS} gaps while the guest writes`, async () => {
    const file = scratchPath('disk.raw');
    const segments = manyGaps();
    await makePattern(file, segments);
    const before = await segmentsChecksum(file, segments);
    const size = totalLength(segments);
    await using guest = await startGuest({ disks: [{ id: 'vda', file, cacheDirect: true }] });
    await guest.waitReady();
    const where = `${size - ROOM} ${ROOM}`;
    const work = async (): Promise<void> => {
      const result = await allocate(guest.qmpSocket, 'vda');
      expect(result).toMatchObject({ after: { allocated: size }, verified: true, guarantee: true });
      expect(result.allocated).toBeGreaterThanOrEqual(GAPS * 4 * KiB);
    };
    await besideWrites(guest, `fallocate through ${GAPS} gaps`, soak ? 20 : 6, work, where);
    expect(await guest.ask(`verify ${where}`)).toMatchObject({ errors: 0 });
    await shutDown(guest);
    expect(await missing(file, 'falloc')).toEqual([]);
    expect(await segmentsChecksum(file, segments)).toBe(before);
  }, 240_000);
});

async function patterned(): Promise<{ file: string; segments: Segment[]; checksum: string }> {
  const file = scratchPath('disk.raw');
  const segments = mixedSegments({ tail: 512 });
  await makePattern(file, segments);
  return { file, segments, checksum: await segmentsChecksum(file, segments) };
}

describe.runIf(withQemu && tools)('a raw disk of a QEMU', () => {
  it('is allocated by a range', async () => {
    const { file, segments, checksum } = await patterned();
    await using machine = await startMachine(diskArgs('disk', 'raw', file));
    const range = { offset: MiB / 2, length: 2 * MiB };
    const args = ['--offset', String(range.offset), '--length', String(range.length)];
    const result = await allocate(machine.qmp, 'dev-disk', ...args);
    expect(result).toMatchObject({ target: `${machine.qmp}#dev-disk`, format: 'raw', effective: range });
    await machine.quit();
    expect(await missing(file, 'falloc', range)).toEqual([]);
    expect(await missing(file, 'falloc')).not.toEqual([]);
    expect(await segmentsChecksum(file, segments)).toBe(checksum);
  });

  it('is allocated where QEMU was given a descriptor for a name', async () => {
    const { file, segments, checksum } = await patterned();
    const args = ['-add-fd', 'fd=9,set=7,opaque=disk', ...diskArgs('disk', 'raw', '/dev/fdset/7')];
    await using machine = await startMachine(args, file);
    expect(await allocate(machine.qmp, 'disk')).toMatchObject({ verified: true, guarantee: true });
    const verdict = await cliJson(['verify', '--qmp', machine.qmp, '--device', 'disk']);
    expect(verdict.document).toMatchObject({ satisfied: true, missing: [] });
    await machine.quit();
    expect(await missing(file, 'falloc')).toEqual([]);
    expect(await segmentsChecksum(file, segments)).toBe(checksum);
  });

  it('is never taken for the file that has its name by now', async () => {
    const { file, segments, checksum } = await patterned();
    await using machine = await startMachine(diskArgs('disk', 'raw', file));
    const moved = scratchPath('moved.raw');
    renameSync(file, moved);
    writeFileSync(file, Buffer.alloc(4096));
    const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk');
    expect(document.error).toMatchObject({ code: 'CHANGED' });
    expect(status).toBe(1);
    renameSync(moved, file);
    await allocate(machine.qmp, 'disk');
    await machine.quit();
    expect(await missing(file, 'falloc')).toEqual([]);
    expect(await segmentsChecksum(file, segments)).toBe(checksum);
  });

  it('is refused what needs it alone', async () => {
    const { file, segments, checksum } = await patterned();
    await using machine = await startMachine(diskArgs('disk', 'raw', file));
    for (const [code, status, ...args] of [
      ['IN_USE', 4, '--preallocation', 'full'],
      ['IN_USE', 4, '--route', 'zero-write'],
      ['USAGE', 2, '--preallocation', 'metadata'],
      ['USAGE', 2, '--route', 'populate'],
    ] as const) {
      const outcome = await allocateAny<Refusal>(machine.qmp, 'disk', ...args);
      expect(outcome.document.error, args.join(' ')).toMatchObject({ code });
      expect(outcome.status).toBe(status);
    }
    await machine.quit();
    expect(await segmentsChecksum(file, segments)).toBe(checksum);
  });

  it('is allocated where it is a part of a file', async () => {
    const { file } = await patterned();
    const part = { driver: 'raw', offset: 2 * MiB, size: 3 * MiB };
    await using machine = await startMachine(diskArgs('disk', 'raw', file, part));
    const outcome = await allocateAny<Refusal>(machine.qmp, 'disk');
    expect(outcome.document.error).toMatchObject({ code: 'UNSUPPORTED' });
    await machine.quit();
  });

  it('is refused where its file is not to be found', async () => {
    await using machine = await startMachine([
      ...['-blockdev', JSON.stringify({ driver: 'raw', 'node-name': 'disk', file: { driver: 'null-co', size: MiB } })],
      ...['-device', 'virtio-blk-pci,id=dev-disk,drive=disk'],
    ]);
    const outcome = await allocateAny<Refusal>(machine.qmp, 'disk');
    expect(outcome.status).not.toBe(0);
    expect(outcome.document.error.code).toMatch(/^(IN_USE|UNSUPPORTED)$/);
    await machine.quit();
  });
});
