import { closeSync, ftruncateSync, openSync, writeSync } from 'node:fs';

/** What guests read and write, computed at the host: the same as test/support/guest/pattern.c. */

const SECTOR = 512;
export const BLOCK = 4096;
const KiB = 1024;

/** Of a block that the guest has not written. */
export const UNWRITTEN = 0;
/** Of a block that may hold anything: its write failed, or it was discarded. */
export const UNKNOWN = 0xffff_ffff;

/** What a disk held before the guest: regions in turn zeros (the first) and data, then zeros. */
export interface Base {
  seed: number;
  /** Bytes of a region, whole blocks. */
  region: number;
  /** Bytes with regions, whole blocks. */
  length: number;
}

export interface TemplateOptions {
  /** Bytes, whole blocks. */
  size: number;
  seed: number;
  /** The default lets borders fall into qcow2 clusters. */
  region?: number;
}

function mix(value: number): number {
  let x = Math.imul(value ^ (value >>> 16), 0x85ebca77);
  x = Math.imul(x ^ (x >>> 13), 0x9e3779b1);
  return (x ^ (x >>> 16)) >>> 0;
}

function generationOf(seed: number, count: number): number {
  const generation = mix((mix(count + 1) + seed) | 0);
  return generation === UNWRITTEN || generation === UNKNOWN ? 1 : generation;
}

/** Fills the buffer with the content of the disk at the offset, as the given write left it. */
function fillBlocks(buffer: Buffer, offset: number, generation: number): void {
  if (generation === UNWRITTEN) {
    buffer.fill(0);
    return;
  }
  const words = new Uint32Array(buffer.buffer, buffer.byteOffset, buffer.length / 4);
  for (let at = 0; at < buffer.length; at += SECTOR) {
    fillSector(words.subarray(at / 4, (at + SECTOR) / 4), (offset + at) / SECTOR, generation);
  }
}

/** 64-bit words in little-endian halves, since numbers are exact to 53 bits only. */
function fillSector(words: Uint32Array, sector: number, generation: number): void {
  const high32 = Math.floor(sector / 2 ** 32);
  let low = mix((mix(sector % 2 ** 32 | 0) + high32 + generation) | 0);
  let high = mix((low + generation) | 0);
  for (let i = 0; i < words.length; i += 2) {
    words[i] = low;
    words[i + 1] = high;
    const sum = low + 0x7f4a7c15;
    low = sum >>> 0;
    high = (high + 0x9e3779b9 + (sum > 0xffff_ffff ? 1 : 0)) >>> 0;
  }
}

/** Makes a raw file whose data regions are written and whose other ones are holes. */
export function makeTemplate(path: string, { size, seed, region = 200 * KiB }: TemplateOptions): Base {
  const base = { seed, region, length: size };
  expectedImage(path, size, base, []);
  return base;
}

/**
 * Writes what a guest must read to a raw file, with holes where that is zeros. Throws where a block
 * is UNKNOWN, since it can't be compared, and RangeError if the size in bytes is not in whole blocks.
 * A list shorter than the disk means that the rest is unwritten.
 */
export function expectedImage(
  path: string,
  size: number,
  base: Base | null,
  generations: ArrayLike<number>,
): void {
  if (size % BLOCK !== 0) throw new RangeError(`${size} bytes are not whole blocks of ${BLOCK}`);
  const descriptor = openSync(path, 'w');
  try {
    ftruncateSync(descriptor, size);
    for (const run of runsOf(size / BLOCK, (block) => expected(block, base, generations))) {
      writeRun(descriptor, run);
    }
  } finally {
    closeSync(descriptor);
  }
}

function expected(block: number, base: Base | null, generations: ArrayLike<number>): number {
  const generation = generations[block] ?? UNWRITTEN;
  if (generation === UNKNOWN) throw new Error(`the block at ${block * BLOCK} may hold anything`);
  if (generation !== UNWRITTEN || base === null) return generation;
  const offset = block * BLOCK;
  const isData = offset < base.length && Math.floor(offset / base.region) % 2 === 1;
  return isData ? generationOf(base.seed, 0) : UNWRITTEN;
}

interface Run {
  block: number;
  count: number;
  generation: number;
}

const MOST_BLOCKS = 256;

function* runsOf(blocks: number, generationAt: (block: number) => number): Generator<Run> {
  for (let block = 0; block < blocks; ) {
    const generation = generationAt(block);
    const most = Math.min(blocks - block, MOST_BLOCKS);
    let count = 1;
    while (count < most && generationAt(block + count) === generation) count++;
    yield { block, count, generation };
    block += count;
  }
}

function writeRun(descriptor: number, { block, count, generation }: Run): void {
  if (generation === UNWRITTEN) return;
  const buffer = Buffer.alloc(count * BLOCK);
  fillBlocks(buffer, block * BLOCK, generation);
  writeSync(descriptor, buffer, 0, buffer.length, block * BLOCK);
}

/** Reads the answer to `dump`: runs of equal generations. */
export function parseDump(text: string): Uint32Array {
  const runs = text.split(' ').filter((run) => run !== '');
  const pairs = runs.map((run) => {
    const match = /^(\d+)x([0-9a-f]{1,8})$/.exec(run);
    if (!match) throw new Error(`not a run of generations: ${run}`);
    return { count: Number(match[1]), generation: parseInt(match[2]!, 16) };
  });
  const generations = new Uint32Array(pairs.reduce((sum, { count }) => sum + count, 0));
  let at = 0;
  for (const { count, generation } of pairs) {
    generations.fill(generation, at, at + count);
    at += count;
  }
  return generations;
}
