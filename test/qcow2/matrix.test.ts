import { describe, expect, it } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { allCases, make, sizeOf, type Case } from '../native/qcow2-cases.js';
import { soak, type Level } from '../native/qcow2-tool.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { mustRun } from '../support/processes.js';
import { allocate, expectTwoLevels, info, keepingContent, measured, TOOLS, unmapped, verify } from './helpers.js';

const able = requires({ tools: TOOLS });
const seed = Number(process.env.THICKEN_SEED ?? 4711);
const levels: Level[] = ['metadata', 'falloc', 'full'];
// The core has a matrix of its own (test/native): here it is the way through the library.
const cases = soak ? allCases() : allCases().filter((_, i) => i % 13 === 0);

it('covers images of each cluster size, with and without snapshots', () => {
  expect(cases.length).toBeGreaterThan(15);
  expect(new Set(cases.map(({ clusterSize }) => clusterSize)).size).toBe(4);
  expect(new Set(cases.map(({ snapshots }) => snapshots)).size).toBe(2);
});

describe.runIf(able)('an image at rest', () => {
  it.each(cases)('$name', { timeout: 120_000 }, async (one) => {
    const level = levels[cases.indexOf(one) % 3]!;
    const file = scratchPath('image.qcow2');
    await make(file, one, seed + cases.indexOf(one));
    await expectTwoLevels(file);
    const result = await keepingContent(file, () => allocate(file, { preallocation: level }));
    expect(result.after?.allocated).toBe(sizeOf(one));
    if (!one.extended || one.snapshots === 0) expect(isMixed(result)).toBe(false);
    expect(result.guarantee).toBe(level !== 'metadata' && !isMixed(result));
    expect(await unmapped(file)).toEqual([]);
    await expectTwoLevels(file);
    expect(await verify(file, { preallocation: level })).toMatchObject({
      satisfied: !isMixed(result),
      missing: [],
    });
    await keepingContent(file, () => allocateTheRest(file, level));
    await mustRun('rm', [file]);
  });

  /** Of a cluster that a snapshot shares, a part is marked as zeros: that has no guarantee. */
  const isMixed = ({ warnings }: AllocationResult) => warnings.some((why) => why.includes('marked as zeros in part'));

  /** What an earlier run at a lower level mapped gets the rest. */
  async function allocateTheRest(file: string, before: Level): Promise<void> {
    if (before !== 'full') expect((await verify(file, { preallocation: 'full' })).satisfied).toBe(false);
    const result = await allocate(file, { preallocation: 'full' });
    expect((await verify(file, { preallocation: 'full' })).satisfied).toBe(!isMixed(result));
    const again = await allocate(file, { preallocation: 'full' });
    expect(again).toMatchObject({ allocated: 0, plan: [] });
  }

  const measurable = cases.filter(({ snapshots, fill }) => snapshots === 0 && fill !== 'compressed');

  it.each(measurable)('needs what qemu-img measure says: $name', async (one) => {
    const file = scratchPath('image.qcow2');
    await make(file, one, seed);
    const { needed } = await info(file);
    const expected = await measured(file, optionsOf(one));
    // A refcount table that is outgrown leaves a gap.
    const gap = one.clusterSize === 512 ? 64 * one.clusterSize : 0;
    expect(Math.abs(needed.falloc! - expected)).toBeLessThanOrEqual(gap);
    expect(needed.full).toBe(needed.falloc);
    expect(needed.metadata).toBeLessThan(needed.falloc!);
    await mustRun('rm', [file]);
  });
});

function optionsOf({ clusterSize, version, refcountBits, extended }: Case): string[] {
  const options = [`cluster_size=${clusterSize}`, `compat=${version === 2 ? '0.10' : '1.1'}`];
  if (version === 3) options.push(`refcount_bits=${refcountBits}`);
  if (extended) options.push('extended_l2=on');
  return options;
}
