/** What the tests of qcow2 at rest share. QEMU is the judge. */
import { statSync } from 'node:fs';
import { expect } from 'vitest';
import { open } from '../../lib/index.js';
import type {
  AllocationRequest,
  AllocationResult,
  ImageInfo,
  MapEntry,
  Preallocation,
  Verdict,
} from '../../lib/types.js';
import { CLEAN, check, contentOf, qemuImg, sameContent } from '../native/qcow2-tool.js';
import { expectContract } from '../storage/helpers.js';
import { filefrag, qemuMap, type QemuExtent } from '../support/judges.js';
import { mustRun } from '../support/processes.js';

export const TOOLS = ['qemu-img', 'qemu-io', 'filefrag', 'cmp', 'cp'];

interface Options extends AllocationRequest {
  format?: string;
}

/** Through the library, in this process; the result must be verified. */
export async function allocate(path: string, { format, ...request }: Options = {}): Promise<AllocationResult> {
  await using image = await open(path, { ...(format && { format }) });
  const result = await image.allocate(request).result;
  expectContract(result);
  expect(result.verified).toBe(true);
  return result;
}

export async function verify(
  path: string,
  request: { offset?: number; length?: number; preallocation?: Preallocation; format?: string } = {},
): Promise<Verdict> {
  const { format, ...asked } = request;
  await using image = await open(path, { ...(format && { format }) });
  return await image.verify(asked);
}

export async function info(path: string, format?: string): Promise<ImageInfo> {
  await using image = await open(path, { ...(format && { format }) });
  return await image.info();
}

export async function mapOf(path: string, format?: string): Promise<MapEntry[]> {
  await using image = await open(path, { ...(format && { format }) });
  const entries = [];
  for await (const entry of image.map()) entries.push(entry);
  return entries;
}

export const hostBytes = (file: string): number => statSync(file).blocks * 512;

/** Runs `change`: afterwards the image checks clean, and all of its content is what it was. */
export async function keepingContent<T>(file: string, change: () => Promise<T>): Promise<T> {
  const before = await contentOf(file, 'before');
  const value = await change();
  expect(await check(file)).toEqual(CLEAN);
  const after = await contentOf(file, 'after');
  await sameContent(before, after);
  await mustRun('rm', ['-f', ...before, ...after]);
  return value;
}

/** Ranges of the image that qemu-img map does not find in it. */
export async function unmapped(file: string): Promise<QemuExtent[]> {
  const extents = await qemuMap(file, 'qcow2');
  return extents.filter(({ data, present, offset }) => !present || (!data && offset === undefined));
}

/** As qemu-img merges them: without the host's side, neighbours are one. */
export function merged(entries: readonly MapEntry[]): QemuExtent[] {
  const result: QemuExtent[] = [];
  for (const { start, length, depth, present, zero, data, offset } of entries) {
    const last = result.at(-1);
    const same =
      last?.depth === depth && last.present === present && last.zero === zero && last.data === data;
    const next = last?.offset === undefined ? undefined : last.offset + last.length;
    if (last && same && next === offset) last.length += length;
    else result.push({ start, length, depth, present, zero, data, ...(offset !== undefined && { offset }) });
  }
  return result;
}

/** That `map` says what qemu-img map and filefrag say together. */
export async function expectTwoLevels(file: string, { dataFile = file, format = 'qcow2' } = {}): Promise<void> {
  const entries = await mapOf(file, format);
  // Once read, what is reserved is data to SEEK_DATA, and so to QEMU.
  await mustRun('sync', [dataFile]);
  await mustRun('dd', [`if=${dataFile}`, 'iflag=nocache', 'count=0', 'status=none']);
  expect(merged(entries)).toEqual(await qemuMap(file, 'qcow2'));
  const extents = await filefrag(dataFile);
  for (const { start, length, offset, host } of entries) {
    if (offset === undefined) continue;
    const found = extents.filter((one) => one.offset < offset + length && one.offset + one.length > offset);
    const covered = found.reduce(
      (sum, one) => sum + Math.min(one.offset + one.length, offset + length) - Math.max(one.offset, offset),
      0,
    );
    const where = `bytes ${start} to ${start + length}`;
    expect(covered, where).toBe(host === 'hole' ? 0 : length);
    const flag = { unwritten: 'unwritten', shared: 'shared' }[host as string];
    for (const { flags } of found) {
      expect(flags.includes('unwritten'), where).toBe(flag === 'unwritten');
      expect(flags.includes('shared'), where).toBe(flag === 'shared');
    }
  }
}

/** qemu-img measure with the image's own options. */
export async function measured(file: string, options: string[]): Promise<number> {
  const text = await qemuImg('measure', '--output=json', '-O', 'qcow2', '-o', options.join(), file);
  return (JSON.parse(text) as { 'fully-allocated': number })['fully-allocated'];
}
