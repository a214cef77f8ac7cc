import { expect } from 'vitest';

const ATTEMPTS = 3;

/**
 * No run may go faster than it was told. Whoever else keeps the machine busy makes a run slower, so that
 * one of several has to reach what it was told. Gives the share that the fastest one reached.
 */
export async function expectNear(expected: number, tolerance: number, measure: () => Promise<number>): Promise<number> {
  let fastest = 0;
  for (let i = 0; i < ATTEMPTS && fastest <= 1 - tolerance; i++) {
    const share = (await measure()) / expected;
    expect(share).toBeLessThan(1 + tolerance);
    fastest = Math.max(fastest, share);
  }
  expect(fastest).toBeGreaterThan(1 - tolerance);
  return fastest;
}
