import type { Image } from '../image.js';
import { resolveRange } from '../range.js';
import type { MapEntry } from '../types.js';
import { renderBar } from './bar.js';
import { Buckets } from './buckets.js';
import {
  rangeOf,
  type CommonOptions,
  type QemuOptions,
  type RangeOptions,
} from './options.js';
import { openNamed } from './targets.js';
import { plain, print, printJsonPart, warn } from './output.js';
import { renderSvg, SVG_COLUMNS } from './svg.js';
import { renderTable, type Column } from './table.js';

type Options = CommonOptions & QemuOptions & RangeOptions & { output: 'table' | 'json' | 'bar' | 'svg' };

const PRINTERS = { table: printTable, json: printJsonMap, bar: printBar, svg: printSvg };
const DEFAULT_COLUMNS = 80;

export async function map([path]: string[], options: Options): Promise<number> {
  await using image = await openNamed(path, options);
  const range = rangeOf(options);
  await PRINTERS[options.json ? 'json' : options.output](image, range);
  warn(image.warnings);
  return 0;
}

/** Lines gathered to this many characters are written at once. */
const BATCH = 1 << 16;

/** An array, printed as it comes: a map may have millions of entries. */
async function printJsonMap(image: Image, range: RangeOptions): Promise<void> {
  let batch = '[';
  let separator = '';
  for await (const entries of image.mapPages(range)) {
    for (const entry of entries) {
      batch += separator + jsonOf(entry);
      separator = ',\n';
    }
    if (batch.length > BATCH) {
      await printJsonPart(batch);
      batch = '';
    }
  }
  await printJsonPart(`${batch}]\n`);
}

/** Numbers, booleans, and the name of a state need no quoting: JSON.stringify takes three times as long. */
function jsonOf({ start, length, depth, present, zero, data, offset, host, file }: MapEntry): string {
  const at = offset === undefined ? '' : `"offset":${digits(offset)},`;
  const where = file === undefined ? '' : `,"file":${JSON.stringify(file)}`;
  return `{"start":${digits(start)},"length":${digits(length)},"depth":${depth},"present":${present},"zero":${zero},"data":${data},${at}"host":"${host}"${where}}`;
}

const MILLION = 1e6;

/** Small integers are printed several times as fast as large ones. */
function digits(value: number): string {
  if (value < MILLION) return String(value);
  const low = value % MILLION;
  return digits((value - low) / MILLION) + String(low).padStart(6, '0');
}

const COLUMNS: Column[] = [
  { head: 'offset', align: 'right', width: 18 },
  { head: 'length', align: 'right', width: 18 },
  { head: 'host', width: 11 },
  { head: 'guest' },
];
const TABLE_ROWS = 1000;

async function printTable(image: Image, range: RangeOptions): Promise<void> {
  let rows: string[][] = [];
  let head = true;
  const flush = async () => {
    if (head || rows.length > 0) await print(await renderTable(COLUMNS, rows, head));
    head = false;
    rows = [];
  };
  for await (const entry of image.map(range)) {
    rows.push(rowOf(entry));
    if (rows.length === TABLE_ROWS) await flush();
  }
  await flush();
}

function rowOf({ start, length, host, zero, depth, file = '', offset }: MapEntry): string[] {
  const guest = zero ? 'zero' : 'data';
  const place = offset === undefined ? '' : ` at ${offset}`;
  const where = depth > 0 ? `${guest} @${depth} ${plain(file)}${place}` : guest;
  return [String(start), String(length), host, where.trimEnd()];
}

async function printBar(image: Image, range: RangeOptions): Promise<void> {
  const columns = process.stdout.columns || DEFAULT_COLUMNS;
  await print(renderBar(await bucketsOf(image, range, columns)));
}

async function printSvg(image: Image, range: RangeOptions): Promise<void> {
  await print(renderSvg(image.path, await bucketsOf(image, range, SVG_COLUMNS)));
}

async function bucketsOf(image: Image, request: RangeOptions, columns: number): Promise<Buckets> {
  const range = resolveRange(request, image.size, image.path);
  const buckets = new Buckets(range, columns);
  for await (const page of image.extentPages(range)) buckets.addPage(page);
  return buckets;
}
