import type { Job } from '../job.js';
import type { Progress } from '../types.js';
import { formatBytes, formatSeconds } from '../units.js';
import { plain } from './output.js';

export type ProgressStyle = 'auto' | 'none' | 'json';

/** Shows a job's progress on stderr until `stop` is called. */
export async function showProgress(
  style: ProgressStyle,
  target: string,
  job: Job,
): Promise<{ stop(): void }> {
  if (style === 'json') return showLines(target, job);
  if (style === 'auto' && process.stderr.isTTY) return showBar(target, job);
  return { stop: () => undefined };
}

function showLines(target: string, job: Job) {
  const print = (progress: Progress) =>
    process.stderr.write(`${JSON.stringify({ target, ...progress })}\n`);
  job.on('progress', print);
  return { stop: () => void job.off('progress', print) };
}

async function showBar(target: string, job: Job) {
  const { default: bars } = await import('cli-progress');
  const bar = new bars.SingleBar({
    stream: process.stderr,
    clearOnComplete: true,
    hideCursor: true,
    format: `${plain(target).replaceAll('{', '(')} {bar} {percentage}%  {done} of {all}  {rate}/s  {left}`,
    barsize: 30,
    barCompleteChar: '█',
    barIncompleteChar: '░',
  });
  const show = (progress: Progress) => {
    if (!bar.isActive) bar.start(progress.total, 0, payloadOf(progress));
    bar.update(progress.position, payloadOf(progress));
  };
  // Where the process ends at once, the terminal gets its cursor back all the same.
  const stop = () => {
    process.off('exit', stop);
    job.off('progress', show);
    bar.stop();
  };
  job.on('progress', show);
  process.once('exit', stop);
  return { stop };
}

function payloadOf({ position, total, rate, secondsLeft, paused }: Progress) {
  return {
    done: formatBytes(position),
    all: formatBytes(total),
    rate: formatBytes(Math.round(rate)),
    left: paused ? 'paused' : secondsLeft === null ? '' : `${formatSeconds(secondsLeft)} left`,
  };
}
