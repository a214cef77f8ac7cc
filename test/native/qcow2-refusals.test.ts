import { closeSync, copyFileSync, openSync, readFileSync, readSync, statSync, truncateSync, writeSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { mustRun } from '../support/processes.js';
import { createEncrypted } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { create } from './qcow2-cases.js';
import { ask, buildTool, check, CLEAN, KiB, MiB, must, qemuImg, qemuIo, soak, ZERO_ALLOCATED, DATA } from './qcow2-tool.js';

const able = requires({ tools: ['cmake', 'g++', 'qemu-img', 'qemu-io', 'flock'] });
const base = { clusterSize: 4 * KiB, version: 3, refcountBits: 16, extended: false } as const;

/** One image for all: two L2 tables, a snapshot, some data. */
async function sample(): Promise<string> {
  const file = scratchPath('image.qcow2');
  await create(file, base, 8 * MiB);
  await qemuIo(file, ['write -P 7 1M 100k', 'write -P 8 5M 30k']);
  await qemuImg('snapshot', '-c', 's0', file);
  await qemuIo(file, ['write -P 9 1M 10k']);
  return file;
}

function poke(file: string, offset: number, bytes: number[]): void {
  const fd = openSync(file, 'r+');
  writeSync(fd, Buffer.from(bytes), 0, bytes.length, offset);
  closeSync(fd);
}

function word(file: string, offset: number): number {
  const buffer = Buffer.alloc(8);
  const fd = openSync(file, 'r');
  readSync(fd, buffer, 0, 8, offset);
  closeSync(fd);
  return Number(buffer.readBigUInt64BE() & 0x00fffffffffffe00n);
}

const big = (value: number, length = 8): number[] => {
  const buffer = Buffer.alloc(8);
  buffer.writeBigUInt64BE(BigInt(value));
  return [...buffer.subarray(8 - length)];
};

const l1 = (file: string): number => word(file, 40);
const l2 = (file: string): number => word(file, l1(file));
const block = (file: string): number => word(file, word(file, 48));
/** Place of the first entry of the first L2 table that maps something. */
const entry = (file: string): number => l2(file) + 256 * 8;

/**
 * An image whose L1 table names one L2 table in each of its entries, as many snapshots make it: the same
 * cluster is the first of all. Where its count lies, and the table's.
 */
async function shareOften(file: string, refcountBits: number, tables: number): Promise<Record<'table' | 'cluster', number>> {
  await create(file, { ...base, clusterSize: 512, refcountBits }, tables * 32 * KiB);
  await qemuIo(file, ['write -P 7 0 512']);
  const table = l2(file);
  const cluster = word(file, table);
  // Without the flag that says that there is one reference.
  poke(file, table, big(cluster));
  const words = Buffer.alloc(8 * tables);
  for (let i = 0; i < tables; i++) words.writeBigUInt64BE(BigInt(table), 8 * i);
  const fd = openSync(file, 'r+');
  writeSync(fd, words, 0, words.length, l1(file));
  closeSync(fd);
  const places = { table: countOf(file, table, refcountBits), cluster: countOf(file, cluster, refcountBits) };
  for (const place of Object.values(places)) poke(file, place, big(tables, refcountBits / 8));
  return places;
}

function countOf(file: string, offset: number, refcountBits: number): number {
  const bytes = refcountBits / 8;
  const entries = 512 / bytes;
  const cluster = offset / 512;
  const counts = word(file, word(file, 48) + 8 * Math.floor(cluster / entries));
  return counts + (cluster % entries) * bytes;
}

type Damage = [name: string, code: string, damage: (file: string) => void];

const damages: Damage[] = [
  ['another format', 'NOT_QCOW2', (file) => poke(file, 0, [0x51, 0x46, 0x49, 0xfa])],
  ['an empty file', 'NOT_QCOW2', (file) => truncateSync(file, 0)],
  ['a header cut short', 'NOT_QCOW2', (file) => truncateSync(file, 100)],
  ['version 1', 'UNSUPPORTED', (file) => poke(file, 4, [0, 0, 0, 1])],
  ['version 4', 'UNSUPPORTED', (file) => poke(file, 4, [0, 0, 0, 4])],
  ['an unknown incompatible bit', 'QCOW2_UNKNOWN_FEATURE', (file) => poke(file, 72, [0x40])],
  ['an unknown compression', 'QCOW2_CORRUPT', (file) => poke(file, 104, [1])],
  ['the dirty bit', 'QCOW2_DIRTY', (file) => poke(file, 79, [1])],
  ['the corrupt bit', 'QCOW2_CORRUPT', (file) => poke(file, 79, [2])],
  ['clusters of 256 bytes', 'QCOW2_ABSURD', (file) => poke(file, 20, big(8, 4))],
  ['clusters of 4 MiB', 'QCOW2_ABSURD', (file) => poke(file, 20, big(22, 4))],
  ['refcounts of 128 bits', 'QCOW2_ABSURD', (file) => poke(file, 96, big(7, 4))],
  ['a virtual size beyond all bounds', 'QCOW2_ABSURD', (file) => poke(file, 24, [0x7f])],
  ['an L1 table of 8 GiB', 'QCOW2_ABSURD', (file) => poke(file, 36, big(2 ** 30, 4))],
  ['a refcount table of 16 TiB', 'QCOW2_ABSURD', (file) => poke(file, 56, big(2 ** 32 - 1, 4))],
  ['four billion snapshots', 'QCOW2_ABSURD', (file) => poke(file, 60, big(2 ** 32 - 1, 4))],
  ['a header length of 7', 'QCOW2_CORRUPT', (file) => poke(file, 100, big(7, 4))],
  ['an unknown encryption', 'UNSUPPORTED', (file) => poke(file, 32, big(9, 4))],
  ['LUKS without its header', 'QCOW2_CORRUPT', (file) => poke(file, 32, big(2, 4))],
  ['the bitmaps bit without bitmaps', 'QCOW2_CORRUPT', (file) => poke(file, 95, [1])],
  ['a raw data file that is not external', 'QCOW2_CORRUPT', (file) => poke(file, 95, [2])],
  ['an L1 table too small', 'QCOW2_CORRUPT', (file) => poke(file, 36, big(1, 4))],
  ['an L1 table beyond the file', 'QCOW2_OUTSIDE_FILE', (file) => poke(file, 40, big(2 ** 40))],
  ['an L1 table between clusters', 'QCOW2_CORRUPT', (file) => poke(file, 40, big(l1(file) + 512))],
  ['a refcount table beyond the file', 'QCOW2_OUTSIDE_FILE', (file) => poke(file, 48, big(2 ** 50))],
  ['no refcount table', 'QCOW2_CORRUPT', (file) => poke(file, 56, big(0, 4))],
  ['a refcount block beyond the file', 'QCOW2_OUTSIDE_FILE', (file) => poke(file, word(file, 48) + 8, big(2 ** 40))],
  ['a refcount block between clusters', 'QCOW2_CORRUPT', (file) => poke(file, word(file, 48) + 8, big(512))],
  ['a refcount block that is the L1 table', 'QCOW2_OVERLAP', (file) => poke(file, word(file, 48) + 8, big(l1(file)))],
  ['an L2 table beyond the file', 'QCOW2_OUTSIDE_FILE', (file) => poke(file, l1(file), big(2 ** 40))],
  ['an L2 table that is the L1 table', 'QCOW2_OVERLAP', (file) => poke(file, l1(file), big(l1(file)))],
  ['reserved bits in L1', 'QCOW2_CORRUPT', (file) => poke(file, l1(file) + 7, [1])],
  ['reserved bits in L2', 'QCOW2_CORRUPT', (file) => poke(file, entry(file) + 7, [2])],
  ['a cluster beyond the file', 'QCOW2_CORRUPT', (file) => poke(file, entry(file), [0x80, 0x10])],
  ['a cluster between clusters', 'QCOW2_CORRUPT', (file) => poke(file, entry(file), big(word(file, entry(file)) + 512))],
  ['a cluster that is the L1 table', 'QCOW2_OVERLAP', (file) => poke(file, entry(file), big(l1(file)))],
  ['a cluster that is a refcount block', 'QCOW2_OVERLAP', (file) => poke(file, entry(file), big(block(file)))],
  ['a cluster mapped twice', 'QCOW2_CORRUPT', (file) => poke(file, entry(file) + 8, big(word(file, entry(file))))],
  ['a count of zero', 'QCOW2_CORRUPT', (file) => poke(file, block(file) + (l1(file) / 4096) * 2, [0, 0])],
  ['no count at all', 'QCOW2_CORRUPT', (file) => poke(file, word(file, 48), big(0))],
  ['a shared cluster said not to be', 'QCOW2_CORRUPT', (file) => poke(file, l2(file) + (256 + 10) * 8, [0x80])],
  ['a snapshot table beyond the file', 'QCOW2_OUTSIDE_FILE', (file) => poke(file, 64, big(2 ** 40))],
  ['a snapshot that is the header', 'QCOW2_CORRUPT', (file) => poke(file, 64, big(0))],
  ["a snapshot's L1 table beyond the file", 'QCOW2_OUTSIDE_FILE', (file) => poke(file, word(file, 64), big(2 ** 40))],
  ["a snapshot's L1 table of 32 GiB", 'QCOW2_ABSURD', (file) => poke(file, word(file, 64) + 8, big(2 ** 32 - 1, 4))],
  ['snapshots with extra data of 4 GiB', 'QCOW2_ABSURD', (file) => poke(file, word(file, 64) + 36, big(2 ** 32 - 1, 4))],
  ['a backing name outside the first cluster', 'QCOW2_OUTSIDE_FILE', (file) => poke(file, 8, [...big(4090), ...big(20, 4)])],
  ['a backing name of 2 GiB', 'QCOW2_ABSURD', (file) => poke(file, 8, [...big(1024), ...big(2 ** 31, 4)])],
];

describe.runIf(able)('qcow2 images that must not be touched', () => {
  let tool: string;

  beforeAll(async () => {
    tool = await buildTool('sanitized');
  }, 600_000);

  it.each(damages)('%s: %s', async (_, code, damage) => {
    const file = await sample();
    damage(file);
    const before = readFileSync(file);
    const answer = await ask(tool, 'allocate', file, { level: 'full' });
    expect(answer.code).toBe(code);
    expect(answer.message.length).toBeGreaterThan(5);
    expect(readFileSync(file).equals(before)).toBe(true);
  });

  it('the sample itself is none of them', async () => {
    const file = await sample();
    expect(word(file, entry(file))).toBeGreaterThan(0);
    expect(word(file, entry(file) + 80)).toBeGreaterThan(0);
    await must(tool, 'allocate', file, { level: 'full' });
    expect(await check(file)).toEqual(CLEAN);
  });

  it.each([16, 64])('thousands of references to one cluster are counted, with %i bits', async (bits) => {
    const many = 3000;
    const within = { offset: 0, length: 320 * KiB };
    for (const wrong of ['none', 'table', 'cluster'] as const) {
      const file = scratchPath('many.qcow2');
      const counts = await shareOften(file, bits, many);
      if (wrong === 'none') expect(await check(file)).toEqual(CLEAN);
      else poke(file, counts[wrong], big(2500, bits / 8));
      const before = readFileSync(file);
      const answer = await ask(tool, 'allocate', file, { ...within, level: 'metadata' });
      expect(answer.code, wrong).toBe(wrong === 'none' ? 'OK' : 'QCOW2_CORRUPT');
      if (wrong !== 'none') expect(readFileSync(file).equals(before)).toBe(true);
    }
    // Too high they do no harm, and are put right.
    const file = scratchPath('many.qcow2');
    const counts = await shareOften(file, bits, many);
    for (const place of Object.values(counts)) poke(file, place, big(5000, bits / 8));
    await must(tool, 'allocate', file, { ...within, level: 'metadata' });
    expect(await check(file)).toEqual(CLEAN);
    await qemuIo(file, [`read -P 7 0 512`, `read -P 7 ${(many - 1) * 32 * KiB} 512`]);
  });

  /** The reserve's counts have to lie behind what leaked, where no count is yet: found by the fuzzer. */
  it('a cluster that leaked far behind the end, beside clusters that a write must move', async () => {
    const file = scratchPath('far.qcow2');
    await create(file, { ...base, clusterSize: 512, refcountBits: 64 }, 64 * KiB);
    await qemuIo(file, ['write -P 7 0 64k']);
    await qemuImg('snapshot', '-c', 's0', file);
    // Counts of the clusters from 2,048 on, the last of which is in use by nothing.
    const [added, index, entries] = [Math.ceil(statSync(file).size / 512), 32, 64];
    expect(added % entries).toBeGreaterThan(0);
    poke(file, countOf(file, added * 512, 64), big(1));
    poke(file, added * 512, [...Array<number>(8 * (entries - 1)).fill(0), ...big(1)]);
    poke(file, word(file, 48) + 8 * index, big(added * 512));
    expect(await check(file)).toMatchObject({ corruptions: 0 });
    const { needed } = await must(tool, 'allocate', file, { level: 'falloc' });
    expect(needed.reserve).toBeGreaterThan(0);
    expect(await check(file)).toEqual(CLEAN);
  });

  // Half a minute of reading tables.
  if (soak) {
    it('an image that refers to a cluster more often than can be counted', async () => {
      const release = await buildTool('release');
      const file = scratchPath('many.qcow2');
      // Each entry of the L1 table names a table that names one cluster in all of its entries.
      const tables = 2 ** 21 + 1;
      const { cluster } = await shareOften(file, 64, tables);
      const table = l2(file);
      for (let i = 1; i < 64; i++) poke(file, table + 8 * i, big(word(file, table)));
      poke(file, cluster, big(64 * tables));
      const answer = await ask(release, 'allocate', file, { length: 512, level: 'metadata' });
      expect(answer.code).toBe('UNSUPPORTED');
      expect(answer.message).toContain('more often');
    });
  }

  it('names the repair of a dirty image, and still tells its map', async () => {
    const file = await sample();
    poke(file, 79, [1]);
    expect((await ask(tool, 'allocate', file)).message).toContain('qemu-img check -r all');
    expect((await must(tool, 'map', file)).extents.length).toBeGreaterThan(3);
    expect((await must(tool, 'info', file)).writable).toBe('QCOW2_DIRTY');
  });

  it('content of a backing file has to be populated first, but zero clusters get storage', async () => {
    const backing = scratchPath('backing.raw');
    const file = scratchPath('overlay.qcow2');
    await qemuImg('create', '-q', '-f', 'raw', backing, String(4 * MiB));
    await qemuIo(backing, ['write -P 5 0 4M'], ['-f', 'raw']);
    await qemuImg('create', '-q', '-f', 'qcow2', '-b', backing, '-F', 'raw', file, String(6 * MiB));
    await qemuIo(file, ['write -z 1M 512k', 'write -P 6 2M 64k']);
    const original = `${file}.original`;
    copyFileSync(file, original);
    for (const range of [{}, { offset: MiB, length: 512 * KiB + 1 }]) {
      const answer = await ask(tool, 'allocate', file, range);
      expect(answer.code).toBe('NEEDS_POPULATE');
      expect(readFileSync(file).equals(readFileSync(original))).toBe(true);
    }
    await must(tool, 'allocate', file, { offset: MiB, length: 512 * KiB });
    // Where the backing file has ended there is nothing to populate.
    await must(tool, 'allocate', file, { offset: 4 * MiB, 'backing-end': 4 * MiB });
    expect(await check(file)).toEqual(CLEAN);
    await qemuImg('compare', original, file);
  });

  it('the data file of an image must be open for more than metadata', async () => {
    const file = scratchPath('image.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', `data_file=${file}.data`, file, String(MiB));
    expect((await ask(tool, 'allocate', file, { level: 'falloc' })).code).toBe('UNSUPPORTED');
    await must(tool, 'allocate', file, { level: 'metadata' });
    expect((await must(tool, 'map', file)).extents).toEqual([[0, MiB, ZERO_ALLOCATED, 0, 6]]);
    expect(await check(file)).toEqual(CLEAN);
  });

  it('LUKS images keep the zero flag, and are readable afterwards', async () => {
    const file = scratchPath('image.qcow2');
    const secret = ['--object', 'secret,id=s,data=thicken'];
    const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10';
    await createEncrypted(...secret, '-f', 'qcow2', '-o', options, file, String(4 * MiB));
    const image = ['--image-opts', `driver=qcow2,encrypt.key-secret=s,file.filename=${file}`];
    await mustRun('qemu-io', [...secret, '-c', 'write -P 7 1M 64k', ...image]);
    expect((await must(tool, 'info', file)).luks).toBeGreaterThan(0);
    await must(tool, 'allocate', file, { level: 'full' });
    const { extents } = await must(tool, 'map', file);
    expect(extents.map(([offset, length, state]) => [offset, length, state])).toEqual([
      [0, MiB, ZERO_ALLOCATED],
      [MiB, 64 * KiB, DATA],
      [MiB + 64 * KiB, 3 * MiB - 64 * KiB, ZERO_ALLOCATED],
    ]);
    const read = await mustRun('qemu-io', [
      ...secret,
      ...['-c', 'read -P 0 0 1M', '-c', 'read -P 7 1M 64k', '-c', 'read -P 0 1088k 3008k', ...image],
    ]);
    expect(read).not.toMatch(/fail/i);
    await mustRun('qemu-img', ['check', ...secret, ...image]);
  });

  it('bitmaps and lazy refcounts stay valid', async () => {
    const file = scratchPath('image.qcow2');
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', 'lazy_refcounts=on', file, String(4 * MiB));
    await qemuImg('bitmap', '--add', file, 'kept');
    await qemuImg('bitmap', '--add', '--disable', file, 'off');
    await qemuIo(file, ['write -P 7 1M 64k']);
    const bitmaps = async (): Promise<unknown> => JSON.parse(await qemuImg('info', '--output=json', file))['format-specific'].data;
    const before = await bitmaps();
    await must(tool, 'allocate', file);
    expect(await bitmaps()).toEqual(before);
    expect(await must(tool, 'info', file)).toMatchObject({ bitmaps: 2, autoclear: 1 });
    expect(await check(file)).toEqual(CLEAN);
  });
});
