import { copyFileSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { mustRun } from '../support/processes.js';
import { allCases, FILLS, make, sizeOf, type Case } from './qcow2-cases.js';
import {
  buildTool,
  check,
  CLEAN,
  COMPRESSED,
  contentOf,
  must,
  qemuImg,
  sameContent,
  soak,
  UNALLOCATED,
  ZERO_PLAIN,
  type Answer,
  type Level,
} from './qcow2-tool.js';

const able = requires({ tools: ['cmake', 'g++', 'qemu-img', 'qemu-io', 'cmp', 'flock'] });
const seed = Number(process.env.THICKEN_SEED ?? 4711);
const levels: Level[] = ['metadata', 'falloc', 'full'];

/** Every value of every dimension with every other one, at least once. */
function slice(cases: Case[]): Case[] {
  const seen = new Set<string>();
  return cases.filter((one) => {
    const values = [one.clusterSize, one.version, one.refcountBits, one.extended, one.snapshots, one.fill];
    const pairs = values.flatMap((a, i) => values.slice(i + 1).map((b, j) => `${i}${a}/${i + 1 + j}${b}`));
    const fresh = pairs.filter((pair) => !seen.has(pair));
    if (fresh.length < 2) return false;
    fresh.forEach((pair) => seen.add(pair));
    return true;
  });
}

const cases = soak ? allCases() : slice(allCases());

it('covers every kind of image', () => {
  expect(cases.length).toBeGreaterThan(soak ? 240 : 25);
  expect(new Set(cases.map(({ fill }) => fill)).size).toBe(FILLS.length);
});

describe.runIf(able)('qcow2 images are allocated in place', () => {
  let tool: string;

  beforeAll(async () => {
    tool = await buildTool('sanitized');
  }, 600_000);

  const missingIn = ({ extents }: Answer): unknown[] =>
    extents.filter(([, , state, host]) => state === ZERO_PLAIN || (state === UNALLOCATED && host < 0));

  it.each(cases)('$name', async (one) => {
    const level = levels[cases.indexOf(one) % levels.length]!;
    const file = scratchPath('image.qcow2');
    await make(file, one, seed + cases.indexOf(one));
    expect(await check(file)).toEqual(CLEAN);
    const before = await contentOf(file, 'before');
    const original = `${file}.original`;
    copyFileSync(file, original);

    // A range in the middle first: what lies around it must stay as it is.
    const third = Math.floor(sizeOf(one) / 3);
    const part = { offset: third + 700, length: third, level: 'metadata' };
    await must(tool, 'allocate', file, part);
    expect(await check(file)).toEqual(CLEAN);
    expect(missingIn(await must(tool, 'map', file, { offset: part.offset, length: part.length }))).toEqual([]);
    const around = { offset: part.offset + part.length + one.clusterSize };
    expect(statesOf(await must(tool, 'map', file, around))).toEqual(statesOf(await must(tool, 'map', original, around)));

    const piece = level === 'full' ? 7 * one.clusterSize + 100 : undefined;
    await must(tool, 'allocate', file, { level, piece });
    expect(await check(file)).toEqual(CLEAN);
    await qemuImg('compare', original, file);
    await sameContent(before, await contentOf(file, 'after'));
    const map = await must(tool, 'map', file);
    expect(missingIn(map)).toEqual([]);
    expect(map.extents.reduce((sum, [, length]) => sum + length, 0)).toBe(sizeOf(one));
    if (one.fill === 'compressed' && one.snapshots === 0) {
      expect(map.extents.some(([, , state]) => state === COMPRESSED)).toBe(true);
    }
    expect(await must(tool, 'survey', file)).toMatchObject({ leaks: 0, excess: 0 });

    // There is nothing left to do.
    const again = await must(tool, 'allocate', file, { level });
    expect(again).toMatchObject({ mapped: 0, needed: { data: 0, tables: 0, refcounts: 0 } });
    await mustRun('rm', [file, original, ...before]);
  });
});

const statesOf = ({ extents }: Answer): unknown[] => extents.map(([offset, length, state]) => [offset, length, state]);
