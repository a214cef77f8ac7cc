/** Block jobs: started so that none is left behind, or found and watched. */
import { randomBytes } from 'node:crypto';
import { errors as common } from '../errors.js';
import { BlockJob, type FollowOptions, type StartOptions } from './block-job.js';
import type { QmpClient } from './client.js';
import type { CommitArguments, OnError, StreamArguments } from './commands.js';
import { jobErrors } from './errors.js';
import { qemuSpeed } from './job-control.js';
import { sampleJobs } from './job-sample.js';

export { BlockJob, type FollowOptions, type JobProgress, type StartOptions } from './block-job.js';
export type { JobOutcome, JobState } from './job-sample.js';

export interface StreamOptions {
  /** A device, or a node: the active image. */
  device: string;
  /** Made up if absent. */
  jobId?: string | undefined;
  /** What stays below, one of three: a file's name, its node, or the lowest node that goes. */
  base?: string | undefined;
  baseNode?: string | undefined;
  bottom?: string | undefined;
  /** The name to record in the image for what stays below. */
  backingFile?: string | undefined;
  /** Most bytes a second; no limit if absent. */
  speed?: number | undefined;
  /** `report` if absent: an error ends the job. `stop` pauses it, so that it can be resumed. */
  onError?: OnError | undefined;
  /** true if absent; else the job waits for `finalize` before it changes the graph. */
  autoFinalize?: boolean | undefined;
  filterNodeName?: string | undefined;
}

/**
 * Starts a block-stream. Throws QMP_COMMAND where QEMU refuses, RANGE, CANCELLED. A job that starts
 * after nobody waits for it any more is cancelled.
 */
export async function startStream(
  client: QmpClient,
  options: StreamOptions,
  follow: StartOptions = {},
): Promise<BlockJob> {
  return await start(client, 'block-stream', streamArguments(options), follow);
}

/** The same for a block-commit; of the active image it becomes `ready`, and wants `complete`. */
export function startCommit(
  client: QmpClient,
  args: Omit<CommitArguments, 'auto-dismiss'>,
  follow: StartOptions = {},
): Promise<BlockJob> {
  return start(client, 'block-commit', args, follow);
}

async function start(
  client: QmpClient,
  command: 'block-stream' | 'block-commit',
  args: StreamArguments | CommitArguments,
  follow: StartOptions,
): Promise<BlockJob> {
  if (follow.signal?.aborted) throw common.cancelled(client.name);
  const id = args['job-id'];
  const disown = () => void new BlockJob(client, id, true)[Symbol.asyncDispose]();
  const manual = { 'auto-dismiss': false, ...(follow.beforeFinalize && { 'auto-finalize': false }) };
  await client.executeAny(command, { ...args, ...manual }, { late: disown });
  return new BlockJob(client, id, true, follow);
}

/** Starts a block-stream that nobody watches: QEMU dismisses it itself. Returns its id. */
export async function startDetachedStream(client: QmpClient, options: StreamOptions): Promise<string> {
  const args = streamArguments(options);
  await client.execute('block-stream', { ...args, 'auto-dismiss': true });
  return args['job-id'];
}

/** Watches a job of somebody else's, who dismisses it. Throws UNKNOWN_JOB. */
export async function followJob(
  client: QmpClient,
  id: string,
  follow: FollowOptions = {},
): Promise<BlockJob> {
  const jobs = await sampleJobs(client);
  if (jobs.some((job) => job.id === id)) return new BlockJob(client, id, false, follow);
  throw jobErrors.unknown(client.name, id, jobs.map((job) => job.id));
}

function streamArguments(options: StreamOptions): StreamArguments {
  const { device, base, baseNode, bottom, backingFile, speed, onError, autoFinalize } = options;
  const args = {
    'job-id': options.jobId ?? `thicken-${randomBytes(6).toString('hex')}`,
    device,
    base,
    'base-node': baseNode,
    bottom,
    'backing-file': backingFile,
    speed: speed === undefined ? undefined : qemuSpeed(speed),
    'on-error': onError,
    'auto-finalize': autoFinalize,
    'filter-node-name': options.filterNodeName,
  };
  const given = Object.entries(args).filter(([, value]) => value !== undefined);
  return Object.fromEntries(given) as unknown as StreamArguments;
}
