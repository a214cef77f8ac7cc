import { usageError } from '../errors.js';
import type { QmpClient } from '../qmp/client.js';
import { jobErrors, printable } from '../qmp/errors.js';
import { steer, type Steering } from '../qmp/job-control.js';
import { sampleJobs } from '../qmp/job-sample.js';
import { formatBytes } from '../units.js';
import { onMonitor } from './monitor.js';
import { parseLimit, type MonitorOptions } from './options.js';
import { print, printJson } from './output.js';

/** What is to be done to a job, and how that is told afterwards. */
interface Order {
  how: Steering;
  /** In the JSON document, beside the job's id. */
  told: { action: string; speed?: number | null };
  words: string;
}

type Command = (jobs: string[], options: MonitorOptions, signal: AbortSignal) => Promise<number>;

const verb =
  (how: 'pause' | 'resume' | 'cancel', words: string): Command =>
  ([job], options, signal) =>
    carryOut(job, { how, told: { action: how }, words }, options, signal);

export const pause = verb('pause', 'paused');
export const resume = verb('resume', 'resumed');
export const cancel = verb('cancel', 'cancelled');

export const setSpeed: Command = async (args, options, signal) => {
  const [rate = '', job, ...more] = args.toReversed();
  if (more.length > 0) throw usageError('set-speed takes a job and a rate', 'leave the rest out');
  const speed = parseLimit(rate);
  const limited = Number.isFinite(speed);
  const told = { action: 'set-speed', speed: limited ? speed : null };
  const words = limited ? `at most ${formatBytes(speed)}/s` : 'no limit';
  return carryOut(job, { how: { speed }, told, words }, options, signal);
};

async function carryOut(
  job: string | undefined,
  { how, told, words }: Order,
  options: MonitorOptions,
  signal: AbortSignal,
): Promise<number> {
  const id = await onMonitor(options.qmp, signal, async (client) => {
    const which = job ?? (await onlyJob(client));
    await steer(client, which, how, { signal });
    return which;
  });
  if (options.json) await printJson({ id, ...told });
  else await print(`${printable(id)}: ${words}\n`);
  return 0;
}

/** Throws USAGE, which lists the jobs, unless there is exactly one. */
async function onlyJob(client: QmpClient): Promise<string> {
  const ids = (await sampleJobs(client)).map(({ id }) => id);
  const [only] = ids;
  if (only === undefined || ids.length > 1) throw jobErrors.unnamed(client.name, ids);
  return only;
}
