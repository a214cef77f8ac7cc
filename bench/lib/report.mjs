import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import Table from 'cli-table3';
import { repository } from './build.mjs';
import { chart, formatSeconds } from './chart.mjs';
import { machineFacts } from './machine.mjs';
import { options } from './options.mjs';
import { judge, race } from './trials.mjs';

const folder = join(repository, 'bench/results');

/**
 * Races the rivals, prints a table, and writes NAME.json and NAME.svg.
 * @param {object} benchmark
 * @param {string} benchmark.name
 * @param {string} benchmark.title
 * @param {import('./trials.mjs').Rival[]} benchmark.rivals
 * @param {import('./trials.mjs').Limit[]} [benchmark.limits]
 * @param {string[]} [benchmark.notes]
 * @param {number} [benchmark.trials]
 */
export async function measure({ name, title, rivals, limits = [], notes = [], trials = options.trials }) {
  const present = rivals.filter((rival) => !options.rivalsOnly || !rival.name.startsWith('thicken'));
  const results = await race(present, trials);
  const verdicts = judge(results, limits);
  const slice = options.quick ? 'quick-' : '';
  mkdirSync(folder, { recursive: true });
  const document = { name, title, date: new Date().toISOString(), quick: options.quick, trials };
  const json = { ...document, machine: machineFacts(), notes, limits: verdicts, results };
  writeFileSync(join(folder, `${slice}${name}.json`), `${JSON.stringify(json, null, 2)}\n`);
  writeFileSync(join(folder, `${slice}${name}.svg`), chart(title, results));
  print(title, results, verdicts, notes);
  if (options.check && verdicts.some(({ met }) => !met)) process.exitCode = 1;
  return results;
}

function print(title, results, verdicts, notes) {
  const fastest = Math.min(...results.map(({ median }) => median));
  const table = new Table({
    head: ['', 'median', 'min', 'max', '× fastest', 'count', 'MiB', 'timed'],
    style: { head: [], border: [], compact: true },
  });
  for (const result of results) {
    const { name, median, min, max, count = '', rssMiB, timed } = result;
    const times = [median, min, max].map(formatSeconds);
    const memory = rssMiB === undefined ? '' : rssMiB.toFixed(1);
    table.push([name, ...times, (median / fastest).toFixed(2), count, memory, timed]);
  }
  console.log(`\n${title}\n${table.toString()}`);
  for (const { subject, against, atMost, ratio, met } of verdicts) {
    const limit = `${subject} / ${against} = ${ratio.toFixed(3)}, limit ${atMost.toFixed(3)}`;
    console.log(`${met ? 'met   ' : 'MISSED'} ${limit}`);
  }
  for (const note of notes) console.log(`note: ${note}`);
}
