import { errorJson, errors, toThickenError, type ThickenError } from '../errors.js';
import { open } from '../open.js';
import type {
  AllocationRequest,
  AllocationResult,
  DetachedResult,
} from '../types.js';
import { formatBytes } from '../units.js';
import {
  openOptionsOf,
  rangeOf,
  withKey,
  type CommonOptions,
  type QemuOptions,
  type RangeOptions,
} from './options.js';
import { exitStatus, plain, print, printError, printJson, warn } from './output.js';
import { showProgress, type ProgressStyle } from './progress.js';
import { rangeTable } from './table.js';
import { labelOf, targetsOf, type NamedTarget } from './targets.js';

interface Options
  extends CommonOptions, QemuOptions, RangeOptions, Pick<AllocationRequest, 'speed' | 'iops' | 'keepFree'> {
  preallocation: NonNullable<AllocationRequest['preallocation']>;
  route?: NonNullable<AllocationRequest['route']>;
  exclusive?: boolean;
  dropBacking?: boolean;
  detach?: boolean;
  dryRun?: boolean;
  progress: ProgressStyle;
}

type Outcome = AllocationResult | DetachedResult | { target: string; error: ThickenError };

export function allocate(paths: string[], options: Options, signal: AbortSignal): Promise<number> {
  return withKey(options, (keyed) => allocateAll(paths, keyed, signal));
}

/** One target after the other: they may share a disk. The exit status is the highest of all. */
async function allocateAll(paths: string[], options: Options, signal: AbortSignal): Promise<number> {
  const targets = await targetsOf(paths, options);
  const outcomes: Outcome[] = [];
  for (const target of targets) {
    const outcome = await allocateOne(target, options, signal);
    reportAside(outcome, options);
    if (!options.json) await print(await render(outcome, options));
    outcomes.push(outcome);
  }
  if (options.json) {
    const documents = outcomes.map((outcome) => documentOf(outcome));
    await printJson(targets.length > 1 ? documents : documents[0]);
  }
  return Math.max(...outcomes.map(statusOf));
}

async function allocateOne(
  named: NamedTarget,
  options: Options,
  signal: AbortSignal,
): Promise<Outcome> {
  const target = labelOf(named);
  try {
    if (signal.aborted) throw errors.cancelled(target);
    await using image = await open(named, openOptionsOf(options));
    const request = requestOf(options);
    if (options.dryRun) return await image.dryRun(request);
    if (options.detach) return await image.detach(request);
    const job = image.allocate({ ...request, signal });
    const shown = await showProgress(options.progress, target, job);
    try {
      return await job.result;
    } finally {
      shown.stop();
    }
  } catch (error) {
    return { target, error: toThickenError(error) };
  }
}

function requestOf(options: Options): AllocationRequest {
  const { preallocation, speed, iops, keepFree, route, exclusive, dropBacking } = options;
  return {
    ...rangeOf(options),
    preallocation,
    ...(speed !== undefined && { speed }),
    ...(iops !== undefined && { iops }),
    ...(keepFree !== undefined && { keepFree }),
    ...(route !== undefined && { route }),
    ...(exclusive !== undefined && { exclusive }),
    ...(dropBacking !== undefined && { dropBacking }),
  };
}

function statusOf(outcome: Outcome): number {
  return 'error' in outcome ? exitStatus(outcome.error) : 0;
}

/** Of a target that was not opened any more: its size, and so its ranges, are not known. */
const NOTHING_DONE = {
  requested: null, effective: null, before: { allocated: null }, allocated: 0, skipped: 0, seconds: 0,
};

/** As the contract has it: a result, or the target's error, and what was done if anything was. */
function documentOf(outcome: Outcome): unknown {
  if (!('error' in outcome)) return outcome;
  const { target, error } = outcome;
  const done = error.done ?? (error.code === 'CANCELLED' ? NOTHING_DONE : undefined);
  return { target, error: errorJson(error), ...(done && { done }) };
}

/** Errors and warnings, on stderr; as lines of JSON among those of the progress. */
function reportAside(outcome: Outcome, { progress }: Options): void {
  if (progress === 'json') {
    for (const line of linesOf(outcome)) process.stderr.write(`${JSON.stringify(line)}\n`);
  } else if (!('error' in outcome)) {
    warn(outcome.warnings);
  } else {
    printError(outcome.error);
  }
}

function linesOf(outcome: Outcome): unknown[] {
  if ('error' in outcome) return [documentOf(outcome)];
  return outcome.warnings.map((warning) => ({ target: outcome.target, warning }));
}

function render(outcome: Outcome, options: Options): string | Promise<string> {
  if ('error' in outcome) return renderDone(outcome);
  if ('job' in outcome) return `${plain(outcome.target)}: QEMU streams it; job ${plain(outcome.job)}\n`;
  return options.dryRun ? renderPlan(outcome) : renderResult(outcome);
}

function renderDone({ target, error }: { target: string; error: ThickenError }): string {
  const allocated = error.done?.allocated ?? 0;
  if (allocated === 0) return '';
  return `${plain(target)}: ${formatBytes(allocated)} had been allocated by then\n`;
}

export function renderResult(result: AllocationResult): string {
  const { preallocation, allocated, skipped, seconds, verified, guarantee } = result;
  const target = plain(result.target);
  const did =
    allocated > 0
      ? `${formatBytes(allocated)} allocated (${preallocation}), ${formatBytes(skipped)} were already`
      : `nothing to do, ${formatBytes(skipped)} are allocated (${preallocation})`;
  const check = verified === null ? 'not verifiable' : verified ? 'verified' : 'NOT verified';
  const promise = guarantee ? 'guaranteed' : 'no guarantee';
  return `${target}: ${did}; ${check}, ${promise}; ${seconds} s\n`;
}

async function renderPlan(result: AllocationResult): Promise<string> {
  const { plan, preallocation } = result;
  const target = plain(result.target);
  if (plan.length === 0) return `${target}: nothing to do (${preallocation})\n`;
  // A part may be dealt with by one route after the other.
  const bytes = result.effective.length - result.skipped;
  const headline = `${target}: would allocate ${formatBytes(bytes)} (${preallocation})\n`;
  const rows = plan.map(
    ({ offset, length, route, reason }) => [offset, length, route, reason] as const,
  );
  return headline + (await rangeTable(['route', 'reason'], rows));
}
