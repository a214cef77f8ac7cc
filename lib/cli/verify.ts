import type { Preallocation, Verdict } from '../types.js';
import { formatBytes } from '../units.js';
import {
  rangeOf,
  type CommonOptions,
  type QemuOptions,
  type RangeOptions,
} from './options.js';
import { openNamed } from './targets.js';
import { plain, print, printJson, warn } from './output.js';
import { rangeTable } from './table.js';

type Options = CommonOptions & QemuOptions & RangeOptions & { preallocation: Preallocation };

const NOT_SATISFIED = 3;

export async function verify([path]: string[], options: Options): Promise<number> {
  await using image = await openNamed(path, options);
  const { preallocation } = options;
  const verdict = await image.verify({ ...rangeOf(options), preallocation });
  if (options.json) {
    await printJson(verdict);
  } else {
    await print(await renderVerdict(verdict));
  }
  warn(verdict.warnings);
  return verdict.satisfied ? 0 : NOT_SATISFIED;
}

export async function renderVerdict(verdict: Verdict): Promise<string> {
  const { preallocation, satisfied, missing } = verdict;
  const target = plain(verdict.target);
  if (satisfied) return `${target}: satisfies ${preallocation}\n`;
  const bytes = missing.reduce((sum, range) => sum + range.length, 0);
  const headline = `${target}: does not satisfy ${preallocation}`;
  if (missing.length === 0) return `${headline}: nothing is missing now, but see the warnings\n`;
  const rows = missing.map(({ offset, length, why }) => [offset, length, why] as const);
  return `${headline}: ${formatBytes(bytes)} in ${missing.length} ranges\n${await rangeTable(['why'], rows)}`;
}
