import type { Table } from 'cli-table3';

const MOST_ROWS = 20;

const BORDERLESS = {
  chars: {
    top: '', 'top-mid': '', 'top-left': '', 'top-right': '',
    bottom: '', 'bottom-mid': '', 'bottom-left': '', 'bottom-right': '',
    left: '', 'left-mid': '', mid: '', 'mid-mid': '',
    right: '', 'right-mid': '', middle: ' ',
  },
  style: { 'padding-left': 0, 'padding-right': 1, head: [], border: [] },
};

export interface Column {
  head: string;
  align?: 'left' | 'right';
  width?: number;
}

/** A table without borders. */
export async function renderTable(columns: Column[], rows: string[][], head = true): Promise<string> {
  const { default: TableOf } = await import('cli-table3');
  const table: Table = new TableOf({
    ...BORDERLESS,
    head: head ? columns.map((column) => column.head) : [],
    colAligns: columns.map((column) => column.align ?? 'left'),
    ...(columns[0]?.width && { colWidths: columns.map((column) => column.width ?? null) }),
  });
  table.push(...rows);
  const lines = table.toString().split('\n');
  return lines.map((line) => `${line.trimEnd()}\n`).join('');
}

/** Ranges with more columns behind them; the first twenty, and how many more there are. */
export async function rangeTable(
  heads: string[],
  rows: (readonly [offset: number, length: number, ...rest: string[]])[],
): Promise<string> {
  const columns: Column[] = [
    { head: 'offset', align: 'right' },
    { head: 'length', align: 'right' },
    ...heads.map((head) => ({ head })),
  ];
  const shown = rows.slice(0, MOST_ROWS).map((row) => row.map(String));
  const more = rows.length - shown.length;
  const rest = more > 0 ? `… and ${more} more (see --json)\n` : '';
  return (await renderTable(columns, shown)) + rest;
}
