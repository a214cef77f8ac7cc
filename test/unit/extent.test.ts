import { describe, expect, test } from 'vitest';
import {
  EXTENT_FLAGS,
  extentOf,
  HOLE,
  HOST_STATES,
  meetsLevel,
  SHARED,
  UNKNOWN,
  UNWRITTEN,
  whyMissing,
  WRITTEN,
} from '../../lib/extent.js';

const STATES = [HOLE, UNWRITTEN, WRITTEN, SHARED, UNKNOWN];

describe('extentOf', () => {
  test.each([
    [HOLE, 'hole', true],
    [UNWRITTEN, 'unwritten', true],
    [WRITTEN, 'written', false],
    [SHARED, 'shared', false],
    [UNKNOWN, 'unknown', false],
  ])('tells state %d as %s, which the guest reads as zeros: %s', (state, host, zero) => {
    expect(extentOf(10, 20, state, 3)).toEqual({
      offset: 10, length: 20, depth: 0, present: true, zero, data: !zero, host, flags: 3,
    });
  });

  test('has a name for each state', () => {
    expect(STATES.map((state) => HOST_STATES[state])).toEqual(HOST_STATES);
  });

  test('calls a state that it does not know unknown', () => {
    expect(extentOf(0, 1, 99, 0).host).toBe('unknown');
  });
});

describe('meetsLevel', () => {
  test.each([
    [HOLE, false, false],
    [UNWRITTEN, true, false],
    [WRITTEN, true, true],
    [SHARED, false, false],
    [UNKNOWN, false, false],
  ])('takes state %d for enough: falloc %s, full %s', (state, falloc, full) => {
    expect(meetsLevel(state, 'falloc')).toBe(falloc);
    expect(meetsLevel(state, 'full')).toBe(full);
  });
});

describe('whyMissing', () => {
  test('gives each state that can be missing a reason of its own, that starts with its name', () => {
    const missing = STATES.filter((state) => state !== WRITTEN);
    const reasons = missing.map((state) => whyMissing(state, 0));
    expect(new Set(reasons).size).toBe(missing.length);
    reasons.forEach((reason, i) => expect(reason.startsWith(`${HOST_STATES[missing[i]!]}: `)).toBe(true));
  });

  test('tells delayed allocation from storage that tells nothing', () => {
    expect(whyMissing(UNKNOWN, EXTENT_FLAGS.delalloc)).not.toBe(whyMissing(UNKNOWN, 0));
  });
});
