import { describe, expect, it } from 'vitest';
import { mustRun } from '../support/processes.js';
import { random } from '../support/patterns.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { hostBytes, qemuMap, type QemuExtent } from '../support/judges.js';
import type { ImageInfo, MapEntry } from '../../lib/types.js';
import { cliJson, KiB, MiB, type Refusal } from '../storage/helpers.js';
import { allocate, BELOWS, expectOwn, expectSame, lookBefore, makeBelow, makeOverlay, SIZE, type BelowKind } from './disks.js';
import { expectNothingLeft, withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['nbdkit', 'sha256sum'] });
const CLUSTER = 64 * KiB;

/** The image, what it must look like afterwards, and how the command line names its format. */
async function makeDisk(format: string, kind: BelowKind, seed: number, options: string[] = []) {
  const below = await makeBelow(kind, seed);
  const path = await makeOverlay(below, format, kind === 'a shorter one' ? [...options, '-o', `size=${SIZE}`] : options);
  await qemuIo(path, format, 'write -q -P 99 1M 100k', 'write -q -P 98 5000k 4k', 'write -q -z 10M 256k');
  // QED records no format but raw.
  const words = ['--format', format, '--backing-format', below.format];
  return { path, below, words, before: await lookBefore(path, format, below.files) };
}

describe.runIf(runnable).each(['qcow2', 'qed'])('%s at rest', (format) => {
  describe.each(BELOWS)('over %s', (kind) => {
    it('is populated as a whole, and freed from what is below', async () => {
      const { path, below, words, before } = await makeDisk(format, kind, 11);
      const result = await allocate(path, ...words, '--preallocation', 'metadata', '--drop-backing');
      expect(result).toMatchObject({ verified: true, after: { allocated: SIZE } });
      expect(result.plan.map(({ route }) => route)).toEqual(expect.arrayContaining(['populate', 'stream']));
      await below.release();
      await expectSame(path, format, before, below.files);
      await expectOwn(path, format, 0, SIZE);
      const info = JSON.parse(await mustRun('qemu-img', ['info', '-f', format, '--output=json', path])) as object;
      expect(info).not.toHaveProperty('backing-filename');
    });

    it('is populated by ranges, and nothing is beside them', async () => {
      const { path, below, words, before } = await makeDisk(format, kind, 12);
      const next = random(kind.length);
      for (let i = 0; i < 3; i++) {
        const offset = next() % (SIZE - MiB);
        const length = 1 + (next() % (2 * MiB));
        const old = await qemuMap(path, format);
        const range = ['--offset', String(offset), '--length', String(Math.min(length, SIZE - offset))];
        const { effective } = await allocate(path, ...words, '--preallocation', 'metadata', ...range);
        const end = effective.offset + effective.length;
        expect(effective.offset % CLUSTER).toBe(0);
        await expectOwn(path, format, effective.offset, end);
        const outside = (extents: typeof old) =>
          extents.flatMap(({ start, length: bytes, depth }) => [
            ...piece(start, Math.min(start + bytes, effective.offset), depth),
            ...piece(Math.max(start, end), start + bytes, depth),
          ]);
        expect(joined(outside(await qemuMap(path, format)))).toEqual(joined(outside(old)));
      }
      await expectSame(path, format, before, below.files);
      await below.release();
    });
  });
});

/** Neighbours that tell the same are one. */
function joinedBy<Entry extends { start: number; length: number }>(entries: Entry[]): Entry[] {
  const all: Entry[] = [];
  for (const entry of entries) {
    const last = all.at(-1);
    const same = last && JSON.stringify({ ...last, start: 0, length: 0 }) === JSON.stringify({ ...entry, start: 0, length: 0 });
    if (same) last.length += entry.length;
    else all.push({ ...entry });
  }
  return all;
}

const bytesOf = (extents: QemuExtent[]) => extents.reduce((sum, { length }) => sum + length, 0);

type Piece = [start: number, end: number, depth: number];

function piece(start: number, end: number, depth: number): Piece[] {
  return end > start ? [[start, end, depth]] : [];
}

function joined(pieces: Piece[]): Piece[] {
  const all: Piece[] = [];
  for (const [start, end, depth] of pieces) {
    const last = all.at(-1);
    if (last && last[1] === start && last[2] === depth) last[1] = end;
    else all.push([start, end, depth]);
  }
  return all;
}

describe.runIf(runnable)('a qcow2 image at rest', () => {
  it.each(BELOWS)('over %s gets storage for all of it, and stands alone', async (kind) => {
    const { path, below, words, before } = await makeDisk('qcow2', kind, 13);
    const result = await allocate(path, ...words, '--preallocation', 'full', '--drop-backing');
    expect(result).toMatchObject({ verified: true, guarantee: true, after: { allocated: SIZE } });
    expect(result.plan.map(({ route }) => route)).toEqual(expect.arrayContaining(['populate', 'stream', 'qcow2']));
    await below.release();
    await expectSame(path, 'qcow2', before, below.files);
    await expectOwn(path, 'qcow2', 0, SIZE, true);
    expect(await allocate(path, ...words)).toMatchObject({ allocated: 0, plan: [] });
  });

  it.each([
    ['with clusters in parts', ['-o', 'extended_l2=on']],
    ['of version 2', ['-o', 'compat=0.10']],
    ['with small clusters', ['-o', 'cluster_size=4k']],
    ['with large clusters', ['-o', 'cluster_size=2M']],
    ['with lazy refcounts', ['-o', 'lazy_refcounts=on']],
  ])('%s is allocated over what is below', async (_name, options) => {
    const { path, below, words, before } = await makeDisk('qcow2', 'three layers', 14, options);
    const result = await allocate(path, ...words, '--preallocation', 'falloc', '--drop-backing');
    expect(result).toMatchObject({ verified: true });
    await expectSame(path, 'qcow2', before, below.files);
    await expectOwn(path, 'qcow2', 0, SIZE, true);
  });

  it('with its data in another file is allocated over what is below', async () => {
    const options = ['-o', `data_file=${scratchPath('data.raw')}`];
    const { path, below, words, before } = await makeDisk('qcow2', 'three layers', 14, options);
    const result = await allocate(path, ...words, '--preallocation', 'falloc', '--drop-backing');
    expect(result).toMatchObject({ verified: true });
    await expectSame(path, 'qcow2', before, below.files);
    await expectOwn(path, 'qcow2', 0, SIZE);
  });

  it.each(['metadata', 'falloc'])('whose zeros end within a subcluster gets storage at %s', async (level) => {
    for (const tail of [512, 2048, 3584, 7168]) {
      const [template, path] = [scratchPath('template.raw'), scratchPath('overlay.qcow2')];
      const size = 2 * MiB + tail;
      await mustRun('qemu-img', ['create', '-q', '-f', 'raw', template, String(size)]);
      await qemuIo(template, 'raw', 'write -q -P 5 0 2M');
      const backing = ['-b', template, '-F', 'raw'];
      await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-o', 'extended_l2=on', ...backing, path]);
      const before = await lookBefore(path, 'qcow2', [template]);
      const words = ['--format', 'qcow2', '--preallocation', level];
      expect(await allocate(path, ...words)).toMatchObject({ verified: true });
      await expectSame(path, 'qcow2', before, [template]);
      await expectOwn(path, 'qcow2', 0, size, true);
    }
  });

  it('takes no storage for zeros at level metadata but their clusters', async () => {
    const below = await makeBelow('raw', 18);
    const path = await makeOverlay(below);
    const before = await lookBefore(path, 'qcow2', below.files);
    const content = bytesOf((await qemuMap(path, 'qcow2')).filter(({ zero }) => !zero));
    expect(content).toBeLessThan(SIZE / 2);
    await allocate(path, '--format', 'qcow2', '--preallocation', 'metadata');
    await expectSame(path, 'qcow2', before, below.files);
    await expectOwn(path, 'qcow2', 0, SIZE, true);
    // With tables, and clusters that have zeros and content, too.
    expect(await hostBytes(path)).toBeLessThan(content + 24 * CLUSTER + MiB);
  });

  it('has a map as QEMU has it, with the files that it lies on', async () => {
    const { path, below, words } = await makeDisk('qcow2', 'three layers', 19);
    const { document } = await cliJson<MapEntry[]>(['map', path, ...words]);
    const theirs = await qemuMap(path, 'qcow2');
    const shapes = (entries: Omit<QemuExtent, 'offset'>[]) =>
      joinedBy(entries.map(({ start, length, depth, present, zero, data }) => ({ start, length, depth, present, zero, data })));
    expect(shapes(document)).toEqual(shapes(theirs));
    const files = [path, ...[...below.files].reverse()];
    for (const { depth, file, present } of document) {
      expect(file).toBe(depth > 0 && present ? files[depth] : undefined);
    }
    const info = await cliJson<ImageInfo>(['info', path, ...words]);
    expect(info.document.backing.map((layer) => layer.path)).toEqual(files.slice(1));
    expect(info.document.backing.map((layer) => layer.format)).toEqual(['qcow2', 'qcow2', 'qcow2', 'raw']);
    for (const [i, layer] of info.document.backing.entries()) {
      const own = theirs.filter(({ depth, present }) => present && depth === i + 1);
      expect(layer).toMatchObject({ virtualSize: SIZE, allocated: bytesOf(own) });
    }
    const unopened = await cliJson<ImageInfo>(['info', path]);
    expect(unopened.document.backing).toEqual([{ path: below.name, format: 'qcow2', virtualSize: null }]);
  });

  it('keeps what internal snapshots need of what is below', async () => {
    const { path, below, words, before } = await makeDisk('qcow2', 'raw', 15);
    await mustRun('qemu-img', ['snapshot', '-c', 'then', path]);
    const refused = await cliJson<Refusal>(['allocate', path, ...words, '--drop-backing']);
    expect(refused).toMatchObject({ status: 1, document: { error: { code: 'HAS_SNAPSHOTS' } } });
    await expectNothingLeft();
    await allocate(path, ...words, '--preallocation', 'metadata');
    await expectSame(path, 'qcow2', before, below.files);
    await mustRun('qemu-img', ['snapshot', '-a', 'then', path]);
    await expectSame(path, 'qcow2', before, below.files);
  });

  it('is freed as a whole, or not at all', async () => {
    const { path, words } = await makeDisk('qcow2', 'raw', 16);
    const refused = await cliJson<Refusal>(['allocate', path, ...words, '--drop-backing', '--length', '1M']);
    expect(refused).toMatchObject({ status: 2, document: { error: { code: 'RANGE' } } });
  });

  it('is not populated on its header’s word alone', async () => {
    const { path } = await makeDisk('qcow2', 'raw', 17);
    for (const args of [[], ['--drop-backing'], ['--route', 'populate'], ['--dry-run']]) {
      const refused = await cliJson<Refusal>(['allocate', path, ...args]);
      expect(refused, args.join()).toMatchObject({ status: 2, document: { error: { code: 'FORMAT_REQUIRED' } } });
    }
  });
});
