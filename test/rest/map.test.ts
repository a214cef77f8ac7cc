/** Where the map says that content of lower layers lies: as `qemu-img map` has it. */
import { describe, expect, it } from 'vitest';
import type { MapEntry } from '../../lib/types.js';
import { merged } from '../qcow2/helpers.js';
import { serveFile } from '../nbd/servers.js';
import { cliJson, KiB, MiB } from '../storage/helpers.js';
import { qemuMap, type QemuExtent } from '../support/judges.js';
import { random } from '../support/patterns.js';
import { cli, mustRun } from '../support/processes.js';
import { createEncrypted, qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['nbdkit'] });
const SIZE = 20 * MiB;

interface Shape {
  format: string;
  /** Of the layer; the top's is SIZE. */
  size?: number;
  options?: string;
}

/** Of odd places and lengths, and in an order that scatters clusters over the file. */
function writes(next: () => number, size: number, zeros: boolean): string[] {
  return Array.from({ length: 14 }, (_, i) => {
    const offset = (next() % Math.floor(size / 512 - 1)) * 512;
    const length = Math.min(size - offset, (1 + (next() % 700)) * 512);
    const how = zeros && i % 4 === 3 ? '-z' : `-P ${i + 1}`;
    return `write -q ${how} ${offset} ${length}`;
  });
}

/** Files from the lowest up. */
async function makeChain(seed: number, shapes: Shape[]): Promise<string[]> {
  const next = random(seed);
  const files: string[] = [];
  for (const [i, { format, size = SIZE, options }] of shapes.entries()) {
    const path = scratchPath(`layer${i}.${format}`);
    const below = i === 0 ? [] : ['-b', files[i - 1]!, '-F', shapes[i - 1]!.format];
    const more = options === undefined ? [] : ['-o', options];
    await mustRun('qemu-img', ['create', '-q', '-f', format, ...below, ...more, path, String(size)]);
    await qemuIo(path, format, ...writes(next, size, format === 'qcow2'));
    files.push(path);
  }
  return files;
}

async function mapOf(path: string, ...args: string[]): Promise<MapEntry[]> {
  const { status, stderr, document } = await cliJson<MapEntry[]>(['map', path, '--format', 'qcow2', ...args]);
  expect(status, stderr).toBe(0);
  return document;
}

/** That of a part of the disk. */
function within(extents: QemuExtent[], from: number, to: number): QemuExtent[] {
  return extents.flatMap((extent) => {
    const start = Math.max(extent.start, from);
    const length = Math.min(extent.start + extent.length, to) - start;
    if (length <= 0) return [];
    const { offset } = extent;
    return [{ ...extent, start, length, ...(offset !== undefined && { offset: offset + start - extent.start }) }];
  });
}

const bare = ({ offset: _offset, ...extent }: QemuExtent): QemuExtent => extent;

/** What lies past the end of a layer is zeros: of which layer, there are two opinions within QEMU. */
const settled = (entries: MapEntry[] | QemuExtent[]): QemuExtent[] =>
  merged(entries.map((entry) => {
    const free = entry.zero && !entry.data && entry.offset === undefined && entry.depth > 0;
    return { ...entry, host: '', ...(free && { depth: 0, present: false }) };
  }));

const CHAINS: Record<string, Shape[]> = {
  'raw and qcow2': [{ format: 'raw' }, { format: 'qcow2' }],
  'qcow2 and qcow2': [{ format: 'qcow2' }, { format: 'qcow2' }],
  'raw and three of qcow2': [{ format: 'raw' }, { format: 'qcow2' }, { format: 'qcow2' }, { format: 'qcow2' }],
  'layers of other sizes': [
    { format: 'raw', size: 7 * MiB + 512 },
    { format: 'qcow2', size: 15 * MiB + 5 * KiB, options: 'cluster_size=4k' },
    { format: 'qcow2' },
  ],
  'a longer layer': [{ format: 'qcow2', size: 30 * MiB, options: 'cluster_size=512k' }, { format: 'qcow2' }],
  'clusters in parts': [{ format: 'qcow2', options: 'extended_l2=on' }, { format: 'qcow2', options: 'cluster_size=4k' }],
  'clusters in parts over a raw one': [{ format: 'raw' }, { format: 'qcow2', options: 'extended_l2=on' }, { format: 'qcow2' }],
};

describe.runIf(runnable)('the map of an image over others', () => {
  it.each(Object.keys(CHAINS))('of %s has the places in the layers’ files', async (name) => {
    for (const seed of [1, 2, 3]) {
      const path = (await makeChain(seed, CHAINS[name]!)).at(-1)!;
      const theirs = await qemuMap(path, 'qcow2');
      expect(theirs.some(({ depth, offset, data }) => depth > 0 && data && offset !== undefined)).toBe(true);
      expect(settled(await mapOf(path))).toEqual(settled(theirs));
      if (!name.includes('other sizes')) expect(merged(await mapOf(path))).toEqual(theirs);
      const next = random(seed);
      const from = next() % (SIZE / 2);
      const to = from + 1 + (next() % (SIZE / 2 - 1));
      const part = await mapOf(path, '--offset', String(from), '--length', String(to - from));
      expect(settled(part)).toEqual(settled(within(theirs, from, to)));
    }
  });

  it('names with them the file that they are in, and so does the table', async () => {
    const path = (await makeChain(4, CHAINS['raw and three of qcow2']!)).at(-1)!;
    const rows = (await mustRun('qemu-img', ['map', '-f', 'qcow2', path])).trim().split('\n').slice(1);
    const theirs = rows.map((row) => row.trim().split(/\s+/)).map(([start, length, at, file]) => ({
      start: Number(start), length: Number(length), offset: Number(at), file,
    }));
    const entries = await mapOf(path);
    const ours = merged(entries).filter(({ data, zero }) => data && !zero);
    const fileOf = (at: number) => entries.find(({ start, length }) => start <= at && at < start + length)?.file ?? path;
    expect(ours.map(({ start, length, offset }) => ({ start, length, offset, file: fileOf(start) }))).toEqual(theirs);
    const { stdout } = await cli(['map', path, '--format', 'qcow2']);
    for (const { start, depth, file, offset, zero } of entries) {
      if (depth === 0 || offset === undefined) continue;
      expect(stdout).toMatch(new RegExp(`^ *${start} .*${zero ? 'zero' : 'data'} @${depth} ${file} at ${offset}$`, 'm'));
    }
  });

  it('has none of what is compressed', async () => {
    const [base] = await makeChain(5, [{ format: 'raw' }]);
    const packed = scratchPath('packed.qcow2');
    await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', '-c', base!, packed]);
    await qemuIo(packed, 'qcow2', 'write -q -P 77 3M 200k');
    const path = scratchPath('top.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', packed, '-F', 'qcow2', path]);
    const entries = await mapOf(path);
    // Over NBD, QEMU looks for holes of the file behind a cluster, too; qemu-img map does only where there are many.
    const placesOf = (extents: MapEntry[] | QemuExtent[]) => merged(extents.map((extent) => ({ ...extent, zero: false, host: '' })));
    expect(placesOf(entries)).toEqual(placesOf(await qemuMap(path, 'qcow2')));
    const data = entries.filter((entry) => entry.data);
    expect(new Set(data.map(({ offset }) => offset === undefined))).toEqual(new Set([true, false]));
  });

  it('has those in an external data file', async () => {
    const data = scratchPath('data.raw');
    const [, path] = await makeChain(6, [{ format: 'qcow2', options: `data_file=${data}` }, { format: 'qcow2' }]);
    expect(merged(await mapOf(path!))).toEqual(await qemuMap(path!, 'qcow2'));
  });

  it('has those in a raw export', async () => {
    const [base] = await makeChain(7, [{ format: 'raw', size: 7 * MiB }]);
    const server = await serveFile(base!);
    const path = scratchPath('top.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', server.uri, '-F', 'raw', path, String(SIZE)]);
    expect(settled(await mapOf(path))).toEqual(settled(await qemuMap(path, 'qcow2')));
    await server.process.dispose();
  });

  it.each(['qed', 'vmdk', 'vdi'])('has none of a %s layer, which QEMU alone knows', async (format) => {
    const [, path] = await makeChain(8, [{ format }, { format: 'qcow2' }]);
    const theirs = (await qemuMap(path!, 'qcow2')).map((extent) => (extent.depth > 0 ? bare(extent) : extent));
    expect(merged(await mapOf(path!))).toEqual(merged(theirs.map((extent) => ({ ...extent, host: '' }))));
  });

  it('has those below an image that only QEMU reads, and none of that one', async () => {
    const [base, middle] = await makeChain(9, [{ format: 'raw' }, { format: 'qcow2' }]);
    const path = scratchPath('top.qed');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qed', '-b', middle!, '-F', 'qcow2', path]);
    await qemuIo(path, 'qed', ...writes(random(9), SIZE, false));
    const { document } = await cliJson<MapEntry[]>(['map', path, '--format', 'qed', '--backing-format', 'qcow2']);
    const theirs = (await qemuMap(path, 'qed')).map((extent) => (extent.depth === 0 ? bare(extent) : extent));
    expect(merged(document)).toEqual(merged(theirs.map((extent) => ({ ...extent, host: '' }))));
    expect(document.some(({ file, offset }) => file === base && offset !== undefined)).toBe(true);
  });

  it('has none of an encrypted layer', async () => {
    const secret = ['--object', 'secret,id=s,data=of-the-tests'];
    const [base, path] = [scratchPath('base.qcow2'), scratchPath('top.qcow2')];
    const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10';
    await createEncrypted('-f', 'qcow2', ...secret, '-o', options, base, '2M');
    await mustRun('qemu-io', [...secret, '-c', 'write -q -P 3 100k 300k', '--image-opts', `driver=qcow2,encrypt.key-secret=s,file.filename=${base}`]);
    await mustRun('qemu-img', ['create', '-q', '-u', '-f', 'qcow2', '-b', base, '-F', 'qcow2', path, '2M']);
    const key = scratchPath('key');
    await mustRun('sh', ['-c', `printf of-the-tests > ${key}`]);
    const entries = await mapOf(path, '--secret', `file=${key}`);
    expect(entries.filter(({ data }) => data).length).toBeGreaterThan(0);
    for (const entry of entries) expect(entry).not.toHaveProperty('offset');
  });

  it('opens nothing below by the word of the header alone', async () => {
    const [, path] = await makeChain(10, [{ format: 'raw' }, { format: 'qcow2' }]);
    const { document } = await cliJson<MapEntry[]>(['map', path!]);
    const below = document.filter(({ depth }) => depth > 0);
    expect(below.length).toBeGreaterThan(0);
    for (const entry of below) expect(Object.keys(entry)).not.toEqual(expect.arrayContaining(['offset']));
  });
});
