/** What the tests of NBD targets share: images behind servers, and judgements of them. */

import { expect } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { cliJson, expectContract, KiB, MiB, type Refusal } from '../storage/helpers.js';
import { qemuCompare } from '../support/judges.js';
import { makePattern, type Segment } from '../support/patterns.js';
import { mustRun } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';
import { nbdinfoMap } from './servers.js';

export { KiB, MiB } from '../storage/helpers.js';

/** Holes of all sizes, one smaller than any server's units, and data between. */
export const SEGMENTS: Segment[] = [
  { kind: 'hole', length: 3 * MiB },
  { kind: 'data', length: 64 * KiB },
  { kind: 'hole', length: 4 * KiB },
  { kind: 'data', length: 12 * KiB },
  { kind: 'hole', length: 176 * KiB },
  { kind: 'data', length: MiB },
  ...Array.from({ length: 60 }, (_, i): Segment => ({ kind: i % 2 ? 'data' : 'hole', length: 8 * KiB })),
  { kind: 'hole', length: 5 * MiB + 32 * KiB },
];
export const SIZE = SEGMENTS.reduce((sum, { length }) => sum + length, 0);

/** An image of that pattern, and a copy to compare with. */
export async function imageOf(format: 'raw' | 'qcow2'): Promise<{ path: string; copy: string }> {
  const copy = scratchPath('copy.raw');
  await makePattern(copy, SEGMENTS);
  const path = scratchPath(`image.${format}`);
  if (format === 'raw') await mustRun('cp', ['--sparse=always', copy, path]);
  else await mustRun('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', copy, path]);
  await mustRun('sync', ['-f', path]);
  return { path, copy };
}

export async function expectSame(path: string, format: string, copy: string): Promise<void> {
  expect(await qemuCompare(path, copy, { formatA: format }), `${path} reads as before`).toBe(true);
}

/** Runs `thicken allocate`, which must succeed; `--exclusive` is given. */
export async function allocateExport(uri: string, ...args: string[]): Promise<AllocationResult> {
  const outcome = await cliJson<AllocationResult>(['allocate', uri, '--exclusive', ...args]);
  expect(outcome.status, outcome.stderr).toBe(0);
  expectContract(outcome.document);
  return outcome.document;
}

export async function refusalOf(args: readonly string[], status: number): Promise<Refusal> {
  const outcome = await cliJson<Refusal>(args);
  expect(outcome.status, outcome.stderr).toBe(status);
  return outcome.document;
}

/** Bytes of a range that another client's map calls holes. */
export async function holesOf(uri: string, offset = 0, length = Infinity): Promise<number> {
  const extents = await nbdinfoMap(uri, 'base:allocation');
  expect(extents.length).toBeGreaterThan(0);
  let holes = 0;
  for (const extent of extents) {
    const start = Math.max(offset, extent.offset);
    const end = Math.min(offset + length, extent.offset + extent.length);
    if (end > start && extent.type & 1) holes += end - start;
  }
  return holes;
}

