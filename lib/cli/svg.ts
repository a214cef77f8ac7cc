import {
  ABSENT,
  BACKED_DATA,
  BACKED_ZERO,
  BACKED_ZEROED,
  HOLE,
  OWN_DATA,
  OWN_ZERO,
  OWN_ZEROED,
  SERVED_DATA,
  SERVED_ZEROED,
  SHARED,
  STATE_NAMES,
  UNALLOCATED,
  UNKNOWN,
  UNWRITTEN,
  WRITTEN,
} from '../extent.js';
import { formatBytes } from '../units.js';
import type { Buckets } from './buckets.js';

/** Columns of the picture: one a pixel at its natural size. */
export const SVG_COLUMNS = 760;

const HEIGHT = 132;
const MARGIN = 20;
const BAR_TOP = 40;
const BAR_HEIGHT = 44;

/** Told apart by lightness as well as by hue, on light and dark pages. */
const COLOURS: Record<number, string> = {
  [WRITTEN]: '#1a7f37',
  [UNWRITTEN]: '#54aeff',
  [SHARED]: '#d4a72c',
  [UNKNOWN]: '#a475f9',
  [HOLE]: '#d0d7de',
  [ABSENT]: '#d0d7de',
  [UNALLOCATED]: '#d0d7de',
  [OWN_DATA]: '#1a7f37',
  [OWN_ZERO]: '#54aeff',
  [OWN_ZEROED]: '#4ac26b',
  [SERVED_DATA]: '#1a7f37',
  [SERVED_ZEROED]: '#4ac26b',
  [BACKED_DATA]: '#e5b4a2',
  [BACKED_ZERO]: '#f2dcd3',
  [BACKED_ZEROED]: '#ecc8ba',
};
/** From the bottom of a column to its top. */
const STACK = [
  ...[WRITTEN, OWN_DATA, SERVED_DATA, OWN_ZEROED, SERVED_ZEROED, UNWRITTEN, OWN_ZERO, SHARED, UNKNOWN],
  ...[BACKED_DATA, BACKED_ZEROED, BACKED_ZERO],
];

/** A picture of an image's storage: each column stacked by the share of each state. */
export function renderSvg(name: string, buckets: Buckets): string {
  const width = SVG_COLUMNS + 2 * MARGIN;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${HEIGHT}" width="${width}" height="${HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="13">
<title>${escapeXml(`Storage behind ${name}`)}</title>
<rect width="${width}" height="${HEIGHT}" rx="8" fill="#ffffff" stroke="#d0d7de"/>
<text x="${MARGIN}" y="26" fill="#1f2328" font-weight="600">${escapeXml(shorten(name))}</text>
<text x="${width - MARGIN}" y="26" fill="#59636e" text-anchor="end">${formatBytes(buckets.range.length)}</text>
<rect x="${MARGIN}" y="${BAR_TOP}" width="${SVG_COLUMNS}" height="${BAR_HEIGHT}" fill="${COLOURS[HOLE]}"/>
${STACK.map((state) => columnsOf(buckets, state)).join('')}${legend(buckets)}</svg>
`;
}

/** One path a state: columns that follow each other at the same height are one rectangle. */
function columnsOf(buckets: Buckets, state: number): string {
  let path = '';
  for (let column = 0; column < buckets.columns; ) {
    const [bottom, top] = edges(buckets, column, state);
    let end = column + 1;
    while (end < buckets.columns && sameEdges(edges(buckets, end, state), [bottom, top])) end++;
    if (top > bottom) {
      const y = BAR_TOP + BAR_HEIGHT - top;
      path += `M${MARGIN + column} ${y}h${end - column}v${top - bottom}h${column - end}z`;
    }
    column = end;
  }
  return path === '' ? '' : `<path fill="${COLOURS[state]}" d="${path}"/>\n`;
}

function edges(buckets: Buckets, column: number, state: number): [number, number] {
  let bottom = 0;
  for (const below of STACK.slice(0, STACK.indexOf(state))) bottom += buckets.share(column, below);
  return [pixels(bottom), pixels(Math.min(1, bottom + buckets.share(column, state)))];
}

function pixels(share: number): number {
  return Math.round(share * BAR_HEIGHT * 10) / 10;
}

function sameEdges(a: [number, number], b: [number, number]): boolean {
  return a[0] === b[0] && a[1] === b[1];
}

function legend(buckets: Buckets): string {
  let x = MARGIN;
  let text = '';
  for (const state of [...STACK, HOLE, ABSENT, UNALLOCATED]) {
    const bytes = buckets.totals[state]!;
    if (bytes === 0) continue;
    const label = `${STATE_NAMES[state]} ${formatBytes(bytes)}`;
    text += `<rect x="${x}" y="101" width="12" height="12" rx="2" fill="${COLOURS[state]}"/>`;
    text += `<text x="${x + 18}" y="112" fill="#59636e">${label}</text>\n`;
    x += 150;
  }
  return text;
}

function shorten(name: string): string {
  const letters = [...name];
  return letters.length > 80 ? `…${letters.slice(-79).join('')}` : name;
}

function escapeXml(text: string): string {
  return text
    .replace(/&/g, '&amp;')
    .replace(/</g, '&lt;')
    .replace(/>/g, '&gt;')
    .replace(/"/g, '&quot;')
    // eslint-disable-next-line no-control-regex -- no XML document may hold them
    .replace(/[\u0000-\u001f\u007f\ufffe\uffff]|\p{Surrogate}/gu, ' ');
}
