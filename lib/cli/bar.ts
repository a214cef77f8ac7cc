import { HOLE, HOST_STATES, type HostState } from '../extent.js';
import { formatBytes } from '../units.js';
import type { Buckets } from './buckets.js';
import { styled } from './output.js';

type Colour = 'green' | 'cyan' | 'yellow' | 'magenta' | 'gray';

const COLOURS: Record<HostState, Colour> = {
  written: 'green',
  unwritten: 'cyan',
  shared: 'yellow',
  unknown: 'magenta',
  hole: 'gray',
};

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
  let most: HostState = 'hole';
  let mostShare = 0;
  HOST_STATES.forEach((name, state) => {
    if (state === HOLE) return;
    const share = buckets.share(column, state);
    filled += share;
    if (share > mostShare) [most, mostShare] = [name, share];
  });
  if (filled === 0) return { glyph: EMPTY, colour: COLOURS.hole };
  // The full block is for a column without any hole.
  const height = filled >= 1 - 1e-9 ? 7 : Math.min(6, Math.floor(filled * 8));
  return { glyph: HEIGHTS[height]!, colour: COLOURS[most] };
}

function legend(buckets: Buckets): string {
  const parts = HOST_STATES.map((name, state) => {
    const bytes = buckets.totals[state]!;
    const mark = name === 'hole' ? EMPTY : '█';
    return bytes > 0 ? `${styled(COLOURS[name], mark)} ${name} ${formatBytes(bytes)}` : '';
  });
  return parts.filter(Boolean).join('   ') || 'empty';
}
