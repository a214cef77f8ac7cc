/** Byte ranges and whole disks, of every format and chain, in a QEMU that has them open. */
import { describe, expect, it } from 'vitest';
import { nbdkit } from '../nbd/servers.js';
import { makeTemplate } from '../support/guest-content.js';
import { mustRun } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { scratchPath } from '../support/scratch.js';
import {
  allocate,
  copyOf,
  diskArgs,
  expectAlone,
  expectChecked,
  expectContent,
  KiB,
  MAPPED,
  MiB,
  overlayOf,
  ownRanges,
  startMachine,
  withNbdkit,
  withQemu,
} from './helpers.js';

const SIZE = 16 * MiB;

function template(size = SIZE, seed = 1): string {
  const path = scratchPath('template.raw');
  makeTemplate(path, { size, seed });
  return path;
}

async function asQcow2(raw: string): Promise<string> {
  const path = scratchPath('template.qcow2');
  await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, path]);
  return path;
}

/** Two layers over a raw template, each with something of its own. */
async function threeLayers(): Promise<string> {
  const middle = await overlayOf(template());
  await qemuIo(middle, 'qcow2', 'write -P 7 1M 300k', 'write -z 3M 128k');
  return overlayOf(middle, { backingFormat: 'qcow2' });
}

describe.runIf(withQemu)('a range of an overlay', () => {
  it('is what is populated, data and zeros alike, and nothing else', async () => {
    const file = await overlayOf(template());
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const result = await allocate(machine.qmp, 'disk', '--offset', '10M', '--length', '2M', ...MAPPED);
    expect(result).toMatchObject({
      effective: { offset: 10 * MiB, length: 2 * MiB },
      before: { allocated: 0 },
      after: { allocated: 2 * MiB },
      allocated: 2 * MiB,
      skipped: 0,
      verified: true,
    });
    expect(new Set(result.plan.map(({ route }) => route))).toEqual(new Set(['populate']));
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[10 * MiB, 2 * MiB]]);
    await expectChecked(file, 'qcow2');
    await expectContent(file, 'qcow2', before);
  });

  it('is widened to clusters', async () => {
    const file = await overlayOf(template());
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const from = 5 * MiB - 1;
    const result = await allocate(machine.qmp, 'disk', '--offset', String(from), '--length', '2');
    expect(result).toMatchObject({
      requested: { offset: from, length: 2 },
      effective: { offset: 5 * MiB - 64 * KiB, length: 128 * KiB },
    });
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[5 * MiB - 64 * KiB, 128 * KiB]]);
  });

  it('is left alone where it is the image’s own', async () => {
    const file = await overlayOf(template());
    await qemuIo(file, 'qcow2', 'write -P 9 1M 1M', 'write -z 2M 1M');
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const result = await allocate(machine.qmp, 'disk', '--length', '4M', ...MAPPED);
    expect(result).toMatchObject({ allocated: 2 * MiB, skipped: 2 * MiB, after: { allocated: 4 * MiB } });
    expect(await allocate(machine.qmp, 'disk', '--length', '4M', ...MAPPED)).toMatchObject({
      allocated: 0,
      skipped: 4 * MiB,
      plan: [],
    });
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, 4 * MiB]]);
    await expectContent(file, 'qcow2', before);
  });
});

interface Case {
  name: string;
  format: string;
  make(): Promise<string>;
}

const CASES: Case[] = [
  { name: 'qcow2 over raw', format: 'qcow2', make: () => overlayOf(template()) },
  {
    name: 'qcow2 over qcow2',
    format: 'qcow2',
    make: async () => overlayOf(await asQcow2(template()), { backingFormat: 'qcow2' }),
  },
  { name: 'qcow2 of version 2', format: 'qcow2', make: () => overlayOf(template(), { options: 'compat=0.10' }) },
  {
    name: 'clusters of 4 KiB',
    format: 'qcow2',
    make: () => overlayOf(template(), { options: 'cluster_size=4k' }),
  },
  {
    name: 'clusters of 2 MiB',
    format: 'qcow2',
    make: () => overlayOf(template(), { options: 'cluster_size=2M' }),
  },
  { name: 'QED over raw', format: 'qed', make: () => overlayOf(template(), { format: 'qed' }) },
  { name: 'three layers', format: 'qcow2', make: threeLayers },
  {
    name: 'a template that is smaller',
    format: 'qcow2',
    make: () => overlayOf(template(9 * MiB + 4 * KiB), { size: SIZE }),
  },
  {
    name: 'a template that is larger, and a size in no whole clusters',
    format: 'qcow2',
    make: () => overlayOf(template(), { size: 11 * MiB + 5 * KiB + 512 }),
  },
  {
    name: 'subclusters',
    format: 'qcow2',
    make: () => overlayOf(template(), { options: 'extended_l2=on,cluster_size=128k' }),
  },
];

describe.runIf(withQemu).each(CASES)('$name', ({ format, make }) => {
  it('is populated as a whole', async () => {
    const file = await make();
    await qemuIo(file, format, 'write -P 5 7M 100k', 'write -P 6 9M 1M');
    const before = await copyOf(file, format);
    await using machine = await startMachine(diskArgs('disk', format, file));
    const result = await allocate(machine.qmp, 'disk');
    const size = result.effective.length;
    expect(result).toMatchObject({ format, verified: true, after: { allocated: size } });
    expect(result.allocated + result.skipped).toBe(size);
    await machine.quit();
    expect(await ownRanges(file, format)).toEqual([[0, size]]);
    await expectChecked(file, format);
    await expectAlone(file, format, before);
  });

  it('is populated by a range', async () => {
    const file = await make();
    const before = await copyOf(file, format);
    await using machine = await startMachine(diskArgs('disk', format, file));
    const result = await allocate(machine.qmp, 'disk', '--offset', '3000001', '--length', '4000k');
    const { offset, length } = result.effective;
    expect(offset).toBeLessThanOrEqual(3_000_001);
    expect(offset + length).toBeGreaterThanOrEqual(3_000_001 + 4000 * KiB);
    expect(result).toMatchObject({ verified: true, after: { allocated: length } });
    await machine.quit();
    expect(await ownRanges(file, format)).toEqual([[offset, length]]);
    await expectChecked(file, format);
    await expectContent(file, format, before);
  });
});

describe.runIf(withQemu)('an image without backing', () => {
  it('leaves nothing to populate', async () => {
    const file = await overlayOf(null, { size: SIZE });
    await qemuIo(file, 'qcow2', 'write -P 1 1M 1M');
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const result = await allocate(machine.qmp, 'disk', ...MAPPED);
    expect(result).toMatchObject({ plan: [], allocated: 0, skipped: SIZE });
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[MiB, MiB]]);
    await expectContent(file, 'qcow2', before);
  });
});

describe.runIf(withNbdkit)('a template on a server with latency', () => {
  it('is populated, whole and by range', async () => {
    const raw = template();
    await using server = await nbdkit(['file', raw, 'rdelay=5ms', 'delay-open=1ms'], ['--filter=delay']);
    const file = await overlayOf(server.uri);
    const before = await copyOf(raw, 'raw');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    await allocate(machine.qmp, 'disk', '--offset', '10M', '--length', '2M');
    const result = await allocate(machine.qmp, 'disk');
    expect(result).toMatchObject({ allocated: SIZE - 2 * MiB, skipped: 2 * MiB, verified: true });
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
    await expectChecked(file, 'qcow2');
    await expectAlone(file, 'qcow2', before);
  });
});
