/** Lists the jobs of a QEMU, and steers them: whoever has started them. */
import { rangeError, ThickenError } from '../errors.js';
import { systemClock } from '../throttle.js';
import type { QmpClient } from './client.js';
import { jobErrors, qmpErrors } from './errors.js';
import { devicesOfJobs } from './job-devices.js';
import { isPaused, sampleJobs, stateOf, type JobSample, type JobState } from './job-sample.js';

export type JobVerb = 'pause' | 'resume' | 'cancel' | 'complete' | 'finalize';
export type Steering = JobVerb | { speed: number };

/** A job, as `thicken jobs --json` prints it. */
export interface JobEntry {
  id: string;
  type: string;
  /** The guest's device or the node that the job works on; null where QEMU does not tell. */
  device: string | null;
  status: JobState;
  /** Bytes. */
  position: number;
  total: number;
  /** Most bytes a second; null: no limit. */
  speed: number | null;
  /** By the pace between two looks; null where it stands still. */
  secondsLeft: number | null;
}

const SAMPLE_MS = 250;
const LOOK_MS = 100;
/** Longer than between two looks of a BlockJob without events. */
const OWNERS_LOOKS = 10;
const NEVER = new AbortController().signal;
const RUNNING = new Set<JobState>(['created', 'running']);

/**
 * All jobs; looks twice, `sampleMs` (250) apart, where one is running. Throws CANCELLED, and what
 * QmpClient's commands throw.
 */
export async function listJobs(
  client: QmpClient,
  { sampleMs = SAMPLE_MS, signal = NEVER }: { sampleMs?: number; signal?: AbortSignal } = {},
): Promise<JobEntry[]> {
  const [first, devices] = await Promise.all([sampleJobs(client), devicesOfJobs(client)]);
  const began = performance.now();
  if (!first.some((job) => RUNNING.has(stateOf(job)))) return first.map((job) => entry(job, devices, null));
  await systemClock.sleep(sampleMs, signal);
  if (signal.aborted) throw qmpErrors.cancelled(client.name, 'listing jobs', signal.reason);
  const second = await sampleJobs(client);
  const seconds = (performance.now() - began) / 1000;
  return second.map((job) => {
    const before = first.find(({ id }) => id === job.id);
    return entry(job, devices, before ? (job.position - before.position) / seconds : null);
  });
}

function entry(job: JobSample, devices: Map<string, string>, rate: number | null): JobEntry {
  const { id, type, position, total, speed } = job;
  const status = stateOf(job);
  const moving = RUNNING.has(status) && rate !== null && rate > 0;
  return {
    id,
    type,
    device: devices.get(id) ?? null,
    status,
    position,
    total,
    speed: speed || null,
    secondsLeft: moving ? (total - position) / rate : null,
  };
}

/** QEMU's number for a limit in bytes a second. Throws RANGE unless above 0; Infinity for no limit. */
export function qemuSpeed(bytesPerSecond: number): number {
  if (!(bytesPerSecond > 0)) {
    throw rangeError(`a speed of ${bytesPerSecond} bytes a second`, 'give more than 0, or pause the job');
  }
  if (bytesPerSecond === Infinity) return 0;
  return Math.min(Number.MAX_SAFE_INTEGER, Math.ceil(bytesPerSecond));
}

/**
 * Does as told, also where the job is that way already. Throws UNKNOWN_JOB, which lists the jobs
 * that there are, RANGE, or what QEMU says (QMP_COMMAND).
 */
export async function control(client: QmpClient, id: string, how: Steering): Promise<void> {
  try {
    if (typeof how === 'string') await client.execute(`job-${how}`, { id });
    else await client.execute('block-job-set-speed', { device: id, speed: qemuSpeed(how.speed) });
  } catch (error) {
    if (!(error instanceof ThickenError) || error.code !== 'QMP_COMMAND') throw error;
    const jobs = await sampleJobs(client);
    const job = jobs.find((candidate) => candidate.id === id);
    if (!job) throw jobErrors.unknown(client.name, id, jobs.map((known) => known.id));
    if (!isAlready(job, how)) throw error;
  }
}

function isAlready(job: JobSample, how: Steering): boolean {
  const over = ['aborting', 'concluded', 'null'].includes(job.status);
  switch (how) {
    case 'pause':
      return !over && isPaused(job);
    case 'resume':
      return !over && !isPaused(job);
    case 'cancel':
    case 'finalize':
      return over;
    case 'complete':
    default:
      return false;
  }
}

/**
 * Steers a job, whoever started it, by its id: a verb, or `{ speed }` in bytes a second (Infinity
 * for no limit). Does nothing where the job is that way already. `cancel` waits until the job is
 * gone, as long as `signal` does not abort; where whoever started it does not dismiss it, because
 * it is gone itself, it is dismissed here. Throws UNKNOWN_JOB (with the jobs that there are), RANGE
 * (a speed that is not above 0), QMP_COMMAND (QEMU refuses), CANCELLED.
 */
export async function steer(
  client: QmpClient,
  id: string,
  how: Steering,
  { signal = NEVER }: { signal?: AbortSignal } = {},
): Promise<void> {
  await control(client, id, how);
  if (how === 'cancel') await clearAway(client, id, signal);
}

/** Whoever started the job has the first right to learn its end, which may take a few looks. */
async function clearAway(client: QmpClient, id: string, signal: AbortSignal): Promise<void> {
  let concluded = 0;
  for (;;) {
    if (signal.aborted) throw qmpErrors.cancelled(client.name, 'waiting for a job to go', signal.reason);
    const job = (await sampleJobs(client)).find((candidate) => candidate.id === id);
    if (!job) return;
    if (job.status === 'concluded' && ++concluded > OWNERS_LOOKS) return dismiss(client, id);
    await systemClock.sleep(LOOK_MS, signal);
  }
}

/** A job that is gone by now was dismissed by somebody else. */
export async function dismiss(client: QmpClient, id: string): Promise<void> {
  try {
    await client.execute('job-dismiss', { id });
  } catch (error) {
    if (!(error instanceof ThickenError) || error.code !== 'QMP_COMMAND') throw error;
  }
}
