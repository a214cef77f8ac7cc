import { describe, expect, test } from 'vitest';
import { extentOf, HOST_STATES, meetsLevel, STATE_NAMES, whyMissing } from '../../lib/extent.js';
import {
  BELOW,
  COMPRESSED,
  FIRST_MAPPED,
  guestSide,
  hostSide,
  PLAIN_ZEROS,
  UNMAPPED,
} from '../../lib/mapped.js';
import type { Preallocation } from '../../lib/types.js';

const LEVELS: Preallocation[] = ['metadata', 'falloc', 'full'];
const ALL = STATE_NAMES.map((name, state) => ({ name, state })).slice(FIRST_MAPPED);
const stateOf = (name: string) => STATE_NAMES.indexOf(name);
const met = (state: number) => LEVELS.filter((level) => meetsLevel(state, level));

describe('a state of both sides', () => {
  test('has a name of its own, and the numbers of native/qcow2/host.h', () => {
    expect(new Set(STATE_NAMES).size).toBe(STATE_NAMES.length);
    expect([BELOW, UNMAPPED, PLAIN_ZEROS, COMPRESSED]).toEqual([13, 14, 15, 16]);
    const placed = ['data', 'zeros', 'part', 'snapshot data', 'snapshot zeros', 'kept zeros', 'snapshot kept zeros'];
    const firsts = Object.fromEntries(placed.map((name, i) => [name, 17 + 5 * i]));
    for (const [guest, first] of Object.entries(firsts)) {
      expect(HOST_STATES.map((host) => stateOf(`${guest}, ${host}`))).toEqual([0, 1, 2, 3, 4].map((i) => first + i));
    }
    expect(STATE_NAMES).toHaveLength(54);
  });

  test('is none below the first and beyond the last', () => {
    for (const state of [0, 12, 52, 255]) expect(guestSide(state)).toBeNull();
    expect(hostSide(COMPRESSED)).toBeNull();
  });

  test.each([
    ['backing file', []],
    ['unmapped', []],
    ['plain zeros', []],
    ['compressed', LEVELS],
    ...['data', 'snapshot data', 'kept zeros', 'snapshot kept zeros'].flatMap((guest): [string, Preallocation[]][] => [
      [`${guest}, hole`, ['metadata']],
      [`${guest}, unwritten`, ['metadata', 'falloc']],
      [`${guest}, written`, LEVELS],
      [`${guest}, shared`, ['metadata']],
      [`${guest}, unknown`, ['metadata']],
    ]),
    ...HOST_STATES.flatMap((host): [string, Preallocation[]][] => [
      [`part, ${host}`, []],
      [`zeros, ${host}`, ['metadata']],
      [`snapshot zeros, ${host}`, ['metadata']],
    ]),
  ])('%s meets %j', (name, levels) => {
    expect(met(stateOf(name))).toEqual(levels);
  });

  test('that misses a level has a reason that names what is missing', () => {
    for (const { state } of ALL.filter(({ state: one }) => met(one).length < 3)) {
      expect(whyMissing(state, 0)).toMatch(/^(backing|unmapped|zeros|part|hole|unwritten|shared|unknown): ./);
    }
    expect(whyMissing(stateOf('data, hole'), 0)).toBe('hole: mapped, with no host blocks behind it');
    expect(whyMissing(stateOf('zeros, written'), 0)).toMatch(/^zeros: .*may need new host blocks/);
  });

  test.each([
    ['backing file', 1, false, false, false, 'unknown'],
    ['unmapped', 0, false, true, false, 'hole'],
    ['plain zeros', 0, true, true, false, 'hole'],
    ['compressed', 0, true, false, true, 'compressed'],
    ['data, hole', 0, true, false, true, 'hole'],
    ['zeros, unwritten', 0, true, true, false, 'unwritten'],
    ['part, written', 0, false, true, false, 'written'],
    ['snapshot data, shared', 0, true, false, true, 'shared'],
  ])('%s is told as qemu-img map tells it', (name, depth, present, zero, data, host) => {
    const found = extentOf(1, 2, stateOf(name), 0);
    expect(found).toEqual({ offset: 1, length: 2, depth, present, zero, data, host, flags: 0 });
  });
});
