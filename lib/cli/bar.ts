import {
  ABSENT,
  BACKED_DATA,
  BACKED_ZERO,
  BACKED_ZEROED,
  HOLE,
  STATE_NAMES,
  UNALLOCATED,
} from '../extent.js';
import { formatBytes } from '../units.js';
import type { Buckets } from './buckets.js';
import { styled } from './output.js';

type Colour = 'green' | 'cyan' | 'yellow' | 'magenta' | 'gray';

const COLOURS: Record<string, Colour> = {
  written: 'green',
  unwritten: 'cyan',
  shared: 'yellow',
  unknown: 'magenta',
  hole: 'gray',
  'backing data': 'gray',
  'backing zeros': 'gray',
  absent: 'gray',
  zeros: 'cyan',
  data: 'green',
  unallocated: 'gray',
  'zeroed data': 'green',
  'backing zeroed data': 'gray',
  'served data': 'green',
  'served zeros': 'green',
};
/** What the image has no storage of its own for. */
const MISSING = new Set([HOLE, BACKED_DATA, BACKED_ZERO, BACKED_ZEROED, ABSENT, UNALLOCATED]);

function colourOf(name: string): Colour {
  return COLOURS[name] ?? 'gray';
}

const HEIGHTS = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const EMPTY = '░';

/**
 * One line as wide as its columns: the height of a block is the share that has storage, its colour
 * the state of most of that; below it a legend with sums.
 */
export function renderBar(buckets: Buckets): string {
  let line = '';
  let run = '';
  let colour: Colour | null = null;
  for (let column = 0; column < buckets.columns; column++) {
    const cell = cellOf(buckets, column);
    if (cell.colour !== colour) {
      if (colour) line += styled(colour, run);
      run = '';
      colour = cell.colour;
    }
    run += cell.glyph;
  }
  if (colour) line += styled(colour, run);
  return `${line}\n${legend(buckets)}\n`;
}

function cellOf(buckets: Buckets, column: number): { glyph: string; colour: Colour } {
  let filled = 0;
  let most = 'hole';
  let mostShare = 0;
  STATE_NAMES.forEach((name, state) => {
    if (MISSING.has(state)) return;
    const share = buckets.share(column, state);
    filled += share;
    if (share > mostShare) [most, mostShare] = [name, share];
  });
  if (filled === 0) return { glyph: EMPTY, colour: colourOf('hole') };
  // The full block is for a column without any hole.
  const height = filled >= 1 - 1e-9 ? 7 : Math.min(6, Math.floor(filled * 8));
  return { glyph: HEIGHTS[height]!, colour: colourOf(most) };
}

function legend(buckets: Buckets): string {
  const parts = STATE_NAMES.map((name, state) => {
    const bytes = buckets.totals[state]!;
    const mark = MISSING.has(state) ? EMPTY : '█';
    return bytes > 0 ? `${styled(colourOf(name), mark)} ${name} ${formatBytes(bytes)}` : '';
  });
  return parts.filter(Boolean).join('   ') || 'empty';
}
