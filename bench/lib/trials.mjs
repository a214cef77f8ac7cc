import { spawn } from 'node:child_process';
import { repository } from './build.mjs';

/**
 * @typedef {object} Rival
 * @property {string} name
 * @property {string} command
 * @property {string[]} args
 * @property {boolean} [reports] prints {"seconds": …} of its own; else the whole process is timed
 * @property {string} [note]
 * @property {() => void | Promise<void>} [before] ahead of each trial, not timed
 * @property {() => void | Promise<void>} [after]
 *
 * @typedef {object} Limit what must hold: median of `subject` ≤ atMost × median of `against`
 * @property {string} subject
 * @property {string} against
 * @property {number} atMost
 */

/**
 * Every trial is a fresh process, and the rivals take turns, so that a noisy moment of the
 * machine hits them all alike. Each round has an order of its own: a disk that has rested while a
 * slow rival computed is faster for the one that comes next. A first round warms caches up and is
 * not counted.
 * @param {Rival[]} rivals
 * @param {number} trials
 */
export async function race(rivals, trials) {
  const samples = rivals.map(() => []);
  for (let round = 0; round <= trials; round++) {
    for (const index of orderOf(round, rivals.length)) {
      const sample = await trial(rivals[index]);
      if (round > 0) samples[index].push(sample);
    }
  }
  return rivals.map((rival, index) => summary(rival, samples[index]));
}

/** 0, 1, n-1, 2, n-2, … moved on by one a round: over n rounds each follows each (Williams' design). */
function orderOf(round, count) {
  return Array.from({ length: count }, (_, i) => {
    const step = i % 2 === 1 ? (i + 1) / 2 : count - i / 2;
    return (step + round) % count;
  });
}

async function trial(rival) {
  await rival.before?.();
  const begin = performance.now();
  const stdout = await execute(rival);
  const wallSeconds = (performance.now() - begin) / 1000;
  await rival.after?.();
  if (!rival.reports) return { seconds: wallSeconds, wallSeconds };
  return { ...JSON.parse(stdout), wallSeconds };
}

function execute({ name, command, args, reports }) {
  return new Promise((resolve, reject) => {
    // Output that nobody reads goes to /dev/null: a pipe would be timed with it.
    const stdio = ['ignore', reports ? 'pipe' : 'ignore', 'pipe'];
    const child = spawn(command, args, { stdio, cwd: repository });
    const kill = () => child.kill('SIGKILL');
    // Before the file system is taken away, which was asked for first.
    process.prependOnceListener('exit', kill);
    const text = { stdout: '', stderr: '' };
    for (const stream of ['stdout', 'stderr']) {
      child[stream]?.setEncoding('utf8').on('data', (chunk) => (text[stream] += chunk));
    }
    child.once('error', reject);
    child.once('close', (status) => {
      process.off('exit', kill);
      if (status === 0) resolve(text.stdout);
      else reject(new Error(`${name}: status ${status}: ${text.stderr}`));
    });
  });
}

function summary({ name, reports, note }, samples) {
  const seconds = samples.map((sample) => sample.seconds);
  const rss = samples.map((sample) => sample.rssMiB).filter((value) => value !== undefined);
  return {
    name,
    timed: reports ? 'in process' : 'whole process',
    ...(note ? { note } : {}),
    median: median(seconds),
    min: Math.min(...seconds),
    max: Math.max(...seconds),
    ...(rss.length > 0 ? { rssMiB: Math.max(...rss) } : {}),
    ...(samples[0]?.count === undefined ? {} : { count: samples[0].count }),
    samples,
  };
}

export function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/**
 * @param {ReturnType<typeof summary>[]} results
 * @param {Limit[]} limits
 */
export function judge(results, limits) {
  const medianOf = (name) => results.find((result) => result.name === name)?.median;
  return limits.flatMap((limit) => {
    const [subject, against] = [medianOf(limit.subject), medianOf(limit.against)];
    if (subject === undefined || against === undefined) return [];
    const ratio = subject / against;
    return [{ ...limit, ratio, met: ratio <= limit.atMost }];
  });
}
