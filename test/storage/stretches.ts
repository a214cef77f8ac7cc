/** A file as stretches of one state, as an independent reader and as the library tell them. */
import { stat } from 'node:fs/promises';
import { expect } from 'vitest';
import { open } from '../../lib/index.js';
import type { ByteRange } from '../../lib/types.js';
import { filefrag, type FilefragExtent } from '../support/judges.js';

type State = 'hole' | 'unwritten' | 'written' | 'shared';

export interface Stretch extends ByteRange {
  state: State;
}

function stateOf(flags: readonly string[]): State {
  if (flags.includes('shared')) return 'shared';
  return flags.includes('unwritten') ? 'unwritten' : 'written';
}

/** All of a file's bytes by state, neighbours of one state merged. */
function stretches(extents: readonly FilefragExtent[], size: number): Stretch[] {
  const found: Stretch[] = [];
  let at = 0;
  for (const { offset, length, flags } of extents) {
    if (offset >= size) break;
    add(found, { offset: at, length: offset - at, state: 'hole' });
    const end = Math.min(offset + length, size);
    add(found, { offset, length: end - offset, state: stateOf(flags) });
    at = end;
  }
  add(found, { offset: at, length: size - at, state: 'hole' });
  return found;
}

export function add(to: Stretch[], stretch: Stretch): void {
  if (stretch.length <= 0) return;
  const last = to.at(-1);
  if (last && last.state === stretch.state) last.length += stretch.length;
  else to.push({ ...stretch });
}

/** By filefrag, which asks FIEMAP alone. */
export async function states(path: string): Promise<Stretch[]> {
  return stretches(await filefrag(path), (await stat(path)).size);
}

/** By the library; each of its extents must begin where the one before it ended. */
export async function libraryStretches(path: string, range?: ByteRange): Promise<Stretch[]> {
  await using image = await open(path, { format: 'raw' });
  const found: Stretch[] = [];
  let at = range?.offset ?? 0;
  for await (const { offset, length, host } of image.extents(range)) {
    expect(offset).toBe(at);
    expect(length).toBeGreaterThan(0);
    at += length;
    add(found, { offset, length, state: host as State });
  }
  return found;
}

export function within(all: readonly Stretch[], range: ByteRange): Stretch[] {
  const found: Stretch[] = [];
  const end = range.offset + range.length;
  for (const { offset, length, state } of all) {
    const from = Math.max(offset, range.offset);
    add(found, { offset: from, length: Math.min(offset + length, end) - from, state });
  }
  return found;
}
