import { createHash, type Hash } from 'node:crypto';
import {
  closeSync,
  createReadStream,
  fsyncSync,
  ftruncateSync,
  openSync,
  readSync,
  writeSync,
} from 'node:fs';
import { qemuMap } from './judges.js';
import { run } from './processes.js';

export interface Segment {
  kind: 'data' | 'hole' | 'unwritten';
  length: number;
}

export interface PlacedSegment extends Segment {
  offset: number;
}

const MiB = 1024 * 1024;

/** The same numbers for the same seed (mulberry32), each in [0, 2^32). */
export function random(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return (mixed ^ (mixed >>> 14)) >>> 0;
  };
}

export function place(segments: readonly Segment[]): PlacedSegment[] {
  let offset = 0;
  return segments.map((segment) => {
    const placed = { ...segment, offset };
    offset += segment.length;
    return placed;
  });
}

export function totalLength(segments: readonly Segment[]): number {
  return segments.reduce((sum, { length }) => sum + length, 0);
}

/** Makes a raw file of these segments, synced, so that its extents have settled. */
export async function makePattern(path: string, segments: readonly Segment[], seed = 1): Promise<void> {
  const placed = place(segments);
  const descriptor = openSync(path, 'w');
  try {
    // The full length first: xfs allocates more than is written when a write extends a file.
    ftruncateSync(descriptor, totalLength(segments));
    writeData(descriptor, placed, seed);
    fsyncSync(descriptor);
  } finally {
    closeSync(descriptor);
  }
  await reserve(path, placed);
}

function writeData(descriptor: number, segments: readonly PlacedSegment[], seed: number): void {
  const block = seededBlock(seed);
  for (const { kind, offset, length } of segments) {
    if (kind !== 'data') continue;
    for (let done = 0; done < length; done += MiB) {
      const start = blockStart(offset + done);
      const count = Math.min(MiB, length - done);
      writeSync(descriptor, block, start, count, offset + done);
    }
  }
}

/** A random MiB twice in a row, so that a MiB can be taken from anywhere in the first. */
function seededBlock(seed: number): Buffer {
  const next = random(seed);
  const words = new Uint32Array(MiB / 4).map(() => next());
  const block = Buffer.from(words.buffer);
  return Buffer.concat([block, block]);
}

/** Differs between offsets: data that lands in the wrong place must not look right there. */
function blockStart(offset: number): number {
  return random(Math.floor(offset / 512))() % MiB;
}

async function reserve(path: string, segments: readonly PlacedSegment[]): Promise<void> {
  const commands = segments
    .filter(({ kind, length }) => kind === 'unwritten' && length > 0)
    .map(({ offset, length }) => `falloc -k ${offset} ${length}\n`);
  if (commands.length === 0) return;
  const { status, stdout, stderr } = await run('xfs_io', [path], { input: commands.join('') });
  const complaints = stdout.replaceAll('xfs_io> ', '').trim() + stderr;
  if (status !== 0 || complaints) throw new Error(`can't reserve in ${path}: ${complaints}`);
}

export async function sha256(path: string): Promise<string> {
  const hash = createHash('sha256');
  for await (const chunk of createReadStream(path, { highWaterMark: MiB })) hash.update(chunk as Buffer);
  return hash.digest('hex');
}

/** Covers the data segments alone, each with its offset: quick on a file of many holes. */
export async function segmentsChecksum(path: string, segments: readonly Segment[]): Promise<string> {
  const data = place(segments).filter(({ kind }) => kind === 'data');
  return checksum(path, data, (hash, offset, bytes) => hash.update(`${offset}:`).update(bytes));
}

/**
 * Covers every 4 KiB block that is not all zeros, with its offset: the same before and after
 * zeros were allocated, and holes cost nothing to read.
 */
export async function sparseChecksum(path: string): Promise<string> {
  const data = (await qemuMap(path)).filter((extent) => extent.data);
  return checksum(path, data.map(({ start, length }) => ({ offset: start, length })), hashNonZero);
}

const zeros = Buffer.alloc(4096);

function hashNonZero(hash: Hash, offset: number, bytes: Buffer): void {
  let at = 0;
  while (at < bytes.length) {
    // Blocks are those of the file, wherever the range begins.
    const end = Math.min(bytes.length, at + 4096 - ((offset + at) % 4096));
    const block = bytes.subarray(at, end);
    if (!block.equals(zeros.subarray(0, block.length))) hash.update(`${offset + at}:`).update(block);
    at = end;
  }
}

function checksum(
  path: string,
  ranges: readonly { offset: number; length: number }[],
  add: (hash: Hash, offset: number, bytes: Buffer) => void,
): string {
  const hash = createHash('sha256');
  const buffer = Buffer.alloc(MiB);
  const descriptor = openSync(path, 'r');
  try {
    for (const { offset, length } of ranges) {
      for (let done = 0; done < length; ) {
        const count = readSync(descriptor, buffer, 0, Math.min(MiB, length - done), offset + done);
        if (count === 0) throw new Error(`${path} ends at ${offset + done}, inside its data`);
        add(hash, offset + done, buffer.subarray(0, count));
        done += count;
      }
    }
  } finally {
    closeSync(descriptor);
  }
  return hash.digest('hex');
}
