/** What the storage tests share: sizes, the command line with its JSON, and judgements of extents. */
import { closeSync, ftruncateSync, openSync, writeFileSync } from 'node:fs';
import { stat, statfs } from 'node:fs/promises';
import { basename } from 'node:path';
import { expect } from 'vitest';
import { open } from '../../lib/index.js';
import type { AllocationDone, AllocationRequest, AllocationResult, ByteRange } from '../../lib/types.js';
import type { Filesystem, FilesystemOptions } from '../support/filesystems.js';
import { filefrag, qemuMap, type FilefragExtent } from '../support/judges.js';
import type { Segment } from '../support/patterns.js';
import { cli, mustRun, start, type Outcome, type RunOptions, type Spawned } from '../support/processes.js';

export const KiB = 1024;
export const MiB = KiB * KiB;
export const GiB = KiB * MiB;

/** The long counts that an issue asks for; else a slice of each. */
export const soak = process.env.THICKEN_SOAK === '1';

/** What tests of this folder need in common. */
export const TOOLS = ['xfs_io', 'filefrag', 'qemu-img', 'fallocate'];
export const MKFS_TOOLS = ['mkfs.ext4', 'mkfs.xfs', 'mkfs.btrfs', 'mount'];

export interface JsonOutcome<T> extends Outcome {
  document: T;
}

/** Runs the command line with --json; stdout must be one document whatever the status. */
export async function cliJson<T>(args: readonly string[], options?: RunOptions): Promise<JsonOutcome<T>> {
  const outcome = await cli([...args, '--json'], options);
  return { ...outcome, document: parse(outcome) as T };
}

function parse(outcome: Outcome): unknown {
  try {
    return JSON.parse(outcome.stdout);
  } catch {
    throw new Error(`no JSON document on stdout: ${JSON.stringify(outcome)}`);
  }
}

export interface Refusal {
  target?: string;
  error: {
    code: string;
    message: string;
    errno?: number;
    path?: string;
    needed?: number;
    available?: number;
    offset?: number;
    length?: number;
  };
  done?: AllocationDone;
}

const resultKeys = [
  ...['target', 'format', 'preallocation', 'requested', 'effective', 'plan', 'before', 'after'],
  ...['allocated', 'skipped', 'seconds', 'verified', 'guarantee', 'warnings'],
].sort();

/** Runs `thicken allocate`, which must succeed with a document as in the contract. */
export async function allocate(path: string, ...args: string[]): Promise<AllocationResult> {
  const outcome = await cliJson<AllocationResult>(['allocate', path, ...args]);
  expect(outcome.status, outcome.stderr).toBe(0);
  expectContract(outcome.document);
  return outcome.document;
}

/** The same through the library, in this process. */
export async function allocateHere(path: string, request: AllocationRequest = {}): Promise<AllocationResult> {
  await using image = await open(path);
  const result = await image.allocate(request).result;
  expectContract(result);
  return result;
}

export function expectContract(result: AllocationResult): void {
  expect(Object.keys(result).sort()).toEqual(resultKeys);
  for (const step of result.plan) {
    expect(Object.keys(step).sort()).toEqual(['length', 'offset', 'reason', 'route']);
  }
  expect(typeof result.seconds).toBe('number');
  expect(Array.isArray(result.warnings)).toBe(true);
}

/** One line on stderr, with the code first. */
export function expectOneLine(outcome: Outcome, code: string | RegExp): void {
  const lines = outcome.stderr.trimEnd().split('\n').filter((line) => !isNotice(line));
  expect(lines, outcome.stderr).toHaveLength(1);
  const found = /^thicken: ([A-Z_0-9]+): ./.exec(lines[0]!)?.[1];
  expect(found, outcome.stderr).toMatch(typeof code === 'string' ? new RegExp(`^${code}$`) : code);
}

/** Warnings, and how far a run had come, may stand beside the error. */
function isNotice(line: string): boolean {
  return line.startsWith('thicken: warning:') || line.endsWith(' had been allocated by then');
}

/** What --progress json leaves on stderr: one JSON object a line, the last one as given. */
export function expectJsonLines(stderr: string, last: object): void {
  const lines = stderr.trimEnd().split('\n').map((line) => JSON.parse(line) as unknown);
  expect(lines.at(-1)).toMatchObject(last);
}

/** Starts `thicken` and waits until it has allocated something. */
export async function startAllocation(spawned: Spawned): Promise<Spawned> {
  await spawned.output('stderr', /"position":[1-9]/, { timeout: 60_000 });
  return spawned;
}

/** Of `range`, the parts that no extent covers; with `written`, unwritten ones count as none. */
export function gaps(
  extents: readonly FilefragExtent[],
  range: ByteRange,
  { written = false }: { written?: boolean } = {},
): ByteRange[] {
  const found: ByteRange[] = [];
  const end = range.offset + range.length;
  let at = range.offset;
  for (const { offset, length, flags } of extents) {
    if (written && flags.includes('unwritten')) continue;
    if (offset + length <= at || offset >= end) continue;
    if (offset > at) found.push({ offset: at, length: offset - at });
    at = offset + length;
  }
  if (at < end) found.push({ offset: at, length: end - at });
  return found;
}

export type Level = 'falloc' | 'full';

/** What a range lacks of a level, by an independent reader of the extents. */
export async function missing(path: string, level: Level, range?: ByteRange): Promise<ByteRange[]> {
  const whole = range ?? { offset: 0, length: (await stat(path)).size };
  if (whole.length === 0) return [];
  return gaps(await extentsOf(path), whole, { written: level === 'full' });
}

/** filefrag's, and on tmpfs, which has no FIEMAP, the data of qemu-img map. */
async function extentsOf(path: string): Promise<FilefragExtent[]> {
  const { type } = await statfs(path);
  if (type !== 0x01021994) return filefrag(path);
  const extents = await qemuMap(path);
  return extents
    .filter(({ data }) => data)
    .map(({ start: offset, length }) => ({ offset, physical: 0, length, flags: [] }));
}

export function bytesOf(ranges: readonly ByteRange[]): number {
  return ranges.reduce((sum, { length }) => sum + length, 0);
}

/** A file of zeros without storage. */
export function makeSparse(path: string, size: number): string {
  const descriptor = openSync(path, 'w');
  ftruncateSync(descriptor, size);
  closeSync(descriptor);
  return path;
}

/** Some of everything: a sparse head, all three states, and a tail that ends within a block. */
export function mixedSegments({ reserve = true, tail = 777 } = {}): Segment[] {
  const unwritten = reserve ? 'unwritten' : 'hole';
  return [
    { kind: 'hole', length: MiB + 8 * KiB },
    { kind: 'data', length: 300 * KiB },
    { kind: 'hole', length: 192 * KiB },
    { kind: unwritten, length: 256 * KiB },
    { kind: 'data', length: 4 * KiB },
    { kind: 'hole', length: 5 * MiB },
    { kind: 'data', length: 64 * KiB },
    { kind: unwritten, length: 128 * KiB },
    { kind: 'hole', length: 3 * MiB + tail },
  ];
}

export interface Storage extends FilesystemOptions {
  name: string;
  /** Files are made with chattr +C. */
  nocow?: boolean;
}

// A small ext4 would have blocks of 1 KiB.
const BLOCKS_4K = ['-b', '4096'];
export const EXT4: Storage = { name: 'ext4', type: 'ext4', size: 128 * MiB, mkfsArgs: BLOCKS_4K };
export const EXT3: Storage = { name: 'ext3-format', type: 'ext3-format', size: 256 * MiB, mkfsArgs: BLOCKS_4K };
export const XFS: Storage = { name: 'xfs', type: 'xfs', size: 320 * MiB };
export const BTRFS: Storage = { name: 'btrfs', type: 'btrfs', size: 320 * MiB };
export const TMPFS: Storage = { name: 'tmpfs', type: 'tmpfs', size: 128 * MiB };

/** An empty file where the pattern goes: NOCOW can only be set on an empty one. */
export async function emptyFile(mounted: Filesystem, storage: Storage, name = 'disk.raw'): Promise<string> {
  const path = makeSparse(`${mounted.path}/${name}`, 0);
  if (storage.nocow) await mustRun('chattr', ['+C', path]);
  return path;
}

/** A process that holds a file or device open, without any lock. */
export async function holdOpen(path: string, how: '<' | '<>' = '<>'): Promise<Spawned> {
  const spawned = start('sh', ['-c', `exec 9${how}"$0" && echo ready && exec sleep 600`, path]);
  await spawned.output('stdout', /ready/);
  return spawned;
}

/** ext4 writes zeros over small reserved neighbours of a write, and calls them written. */
export function keepReserved({ type, device }: Filesystem): void {
  if (type !== 'ext4' || !device) return;
  writeFileSync(`/sys/fs/ext4/${basename(device)}/extent_max_zeroout_kb`, '0');
}
