/** Disks at rest with layers below, and what QEMU says of them. */
import { expect } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { serveFile } from '../nbd/servers.js';
import { random } from '../support/patterns.js';
import { mustRun, run } from '../support/processes.js';
import { qemuCompare, qemuMap } from '../support/judges.js';
import { qemuIo } from '../support/qemu-io.js';
import { scratchPath } from '../support/scratch.js';
import { cliJson, expectContract, KiB, MiB } from '../storage/helpers.js';

/** What lies below an image. */
export interface Below {
  /** As `qemu-img create -b` and `-F` take them. */
  name: string;
  format: string;
  /** The files of it, which must stay as they are. */
  files: string[];
  release(): Promise<void>;
}

export const BELOWS = ['raw', 'qcow2', 'nbd', 'three layers', 'a shorter one'] as const;
export type BelowKind = (typeof BELOWS)[number];

export const SIZE = 24 * MiB;

/** Data and holes that no cluster borders on, by a seed. */
async function rawBelow(seed: number, size = SIZE): Promise<string> {
  const path = scratchPath('base.raw');
  await mustRun('qemu-img', ['create', '-q', '-f', 'raw', path, String(size)]);
  const next = random(seed);
  const writes = Array.from({ length: 12 }, (_, i) => {
    const offset = (next() % (size / 512 - 4096)) * 512;
    return `write -q -P ${i + 1} ${offset} ${(1 + (next() % 2000)) * 512}`;
  });
  await qemuIo(path, 'raw', ...writes);
  return path;
}

export async function makeOverlay(below: Pick<Below, 'name' | 'format'>, format = 'qcow2', options: string[] = []): Promise<string> {
  const path = scratchPath(`overlay.${format}`);
  await mustRun('qemu-img', ['create', '-q', '-f', format, '-b', below.name, '-F', below.format, ...options, path]);
  return path;
}

export async function makeBelow(kind: BelowKind, seed: number): Promise<Below> {
  const nothing = () => Promise.resolve();
  if (kind === 'a shorter one') {
    const short = await rawBelow(seed, SIZE / 2 + 12 * KiB);
    return { name: short, format: 'raw', files: [short], release: nothing };
  }
  const raw = await rawBelow(seed);
  const alone = { name: raw, format: 'raw', files: [raw], release: nothing };
  if (kind === 'raw') return alone;
  if (kind === 'nbd') {
    const server = await serveFile(raw);
    return { name: server.uri, format: 'raw', files: [raw], release: () => server.process.dispose() };
  }
  const middle = await overlayBelow(alone, 9);
  if (kind === 'qcow2') return middle;
  return overlayBelow(await overlayBelow(middle, 13), 17);
}

async function overlayBelow(below: Below, tag: number): Promise<Below> {
  const path = await makeOverlay(below);
  await qemuIo(path, 'qcow2', `write -q -P ${tag} ${tag}M 300k`, `write -q -z ${tag + 2}M 128k`);
  return { name: path, format: 'qcow2', files: [...below.files, path], release: below.release };
}

/** Of an image, what a guest reads from it, in a file of its own; and sums of what must not change. */
export interface Before {
  expected: string;
  sums: string;
}

export async function lookBefore(path: string, format: string, files: readonly string[]): Promise<Before> {
  const expected = scratchPath('expected.raw');
  await mustRun('qemu-img', ['convert', '-f', format, '-O', 'raw', path, expected]);
  return { expected, sums: await sumsOf(files) };
}

function sumsOf(files: readonly string[]): Promise<string> {
  return mustRun('sha256sum', [...files]);
}

/** What `qemu-img check` says of clusters that leaked, and of nothing worse. */
export const LEAKS = 3;

/** The image is sound and reads as it did, and the layers below are as they were. */
export async function expectSame(
  path: string,
  format: string,
  before: Before,
  files: readonly string[],
  sound: readonly number[] = [0],
): Promise<void> {
  const { status, stdout, stderr } = await run('qemu-img', ['check', '-f', format, path]);
  expect(sound, stdout + stderr).toContain(status);
  expect(await qemuCompare(path, before.expected, { formatA: format }), 'the content is another').toBe(true);
  expect(await sumsOf(files)).toBe(before.sums);
}

/** By QEMU's map, the range depends on nothing below; with `data`, it is mapped to storage, too. */
export async function expectOwn(path: string, format: string, offset: number, end: number, data = false): Promise<void> {
  const inRange = (await qemuMap(path, format)).filter(({ start, length }) => start < end && start + length > offset);
  expect(inRange.length).toBeGreaterThan(0);
  for (const extent of inRange) {
    expect(extent, JSON.stringify(extent)).toMatchObject({ depth: 0, present: true });
    // A subcluster that is said to be zeros has its place all the same.
    if (data) expect(extent.offset, JSON.stringify(extent)).toEqual(expect.any(Number));
  }
}

export async function allocate(path: string, ...args: string[]): Promise<AllocationResult> {
  const outcome = await cliJson<AllocationResult>(['allocate', path, ...args]);
  expect(outcome.status, outcome.stderr).toBe(0);
  expectContract(outcome.document);
  return outcome.document;
}
