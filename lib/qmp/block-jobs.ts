/** Block jobs: started, watched to their end, and never left behind. */
import { randomBytes } from 'node:crypto';
import { EventEmitter } from 'node:events';
import { errors as common, ThickenError } from '../errors.js';
import { RateMeter } from '../pace.js';
import type { QmpClient } from './client.js';
import type { CommitArguments, IoStatus, OnError, StreamArguments } from './commands.js';
import { jobErrors } from './errors.js';
import { control, dismiss, qemuSpeed, type Steering } from './job-control.js';
import {
  outcomeOf,
  sampleJobs,
  stateOf,
  type JobOutcome,
  type JobSample,
  type JobState,
} from './job-sample.js';
import { unhurried } from './limits.js';
import type { QmpEvent } from './message.js';

/** Where the position has to be asked for anyway, and where nothing else tells of the end either. */
const POLL_MS = 250;
const POLL_EVENTLESS_MS = 500;

export interface FollowOptions {
  /** Milliseconds between looks. */
  pollMs?: number | undefined;
  /** Cancels the job. */
  signal?: AbortSignal | undefined;
}

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

export interface JobProgress {
  id: string;
  type: string;
  state: JobState;
  /** With `paused-by-error`: why. */
  ioStatus: IoStatus;
  /** Bytes. */
  position: number;
  total: number;
  /** Bytes a second over the last seconds. */
  rate: number;
  secondsLeft: number | null;
}

/**
 * A job that is watched until it ends. Emits `progress` ({@link JobProgress}) at each look. What is
 * believed is what a query says; events only bring the next look forward, so all works without them.
 */
export class BlockJob
  extends EventEmitter<{ progress: [JobProgress] }>
  implements AsyncDisposable
{
  /**
   * How the job ended; by then it is dismissed, if it was started from here. Rejects where that
   * can't be told: QMP_LOST, QMP_PROTOCOL, CLOSED, JOB_GONE (somebody else dismissed it), CANCELLED
   * (watching was ended). A rejection that nobody awaits does not end the process.
   */
  readonly outcome: Promise<JobOutcome>;

  private readonly rate = new RateMeter();
  private latest: JobSample | undefined;
  /** What an event said about the end. */
  private lastWords: { error: string | null; position: number; total: number } | undefined;
  private over = false;
  private leaving = false;
  private stopped = false;
  private woken = false;
  private wake: () => void = () => (this.woken = true);

  /** See startStream, startCommit and followJob. */
  constructor(
    private readonly client: QmpClient,
    readonly id: string,
    private readonly own: boolean,
    private readonly options: FollowOptions = {},
  ) {
    super();
    this.outcome = unhurried(this.follow());
  }

  private async follow(): Promise<JobOutcome> {
    const { signal } = this.options;
    const onAbort = () => void this.cancel().catch(() => undefined);
    const unlisten = this.client.listen((event) => this.note(event));
    void this.client.onLost.then(() => this.wake());
    signal?.addEventListener('abort', onAbort);
    if (signal?.aborted) onAbort();
    try {
      return await this.watch();
    } finally {
      this.over = true;
      unlisten();
      signal?.removeEventListener('abort', onAbort);
    }
  }

  private async watch(): Promise<JobOutcome> {
    for (;;) {
      if (this.stopped) throw jobErrors.unfollowed(this.place());
      const sample = await this.look();
      if (sample === null) return this.vanished();
      if (sample) {
        this.latest = sample;
        this.tell();
        if (sample.status === 'concluded') return this.conclude(sample);
      }
      await this.nap();
    }
  }

  /** null: there is no such job; undefined: QEMU is too busy to say, as it may be with slow storage. */
  private async look(): Promise<JobSample | null | undefined> {
    try {
      return (await sampleJobs(this.client)).find(({ id }) => id === this.id) ?? null;
    } catch (error) {
      const slow = error instanceof ThickenError && error.code === 'QMP_TIMEOUT';
      if (slow && !this.leaving) return undefined;
      throw error;
    }
  }

  private async conclude(sample: JobSample): Promise<JobOutcome> {
    // The outcome is known; a connection that breaks now does not change it.
    if (this.own) await dismiss(this.client, this.id).catch(() => undefined);
    return outcomeOf(this.client.name, sample);
  }

  private vanished(): JobOutcome {
    const { lastWords, id } = this;
    if (!lastWords) throw jobErrors.gone(this.place());
    return outcomeOf(this.client.name, { id, type: this.place().type, ...lastWords });
  }

  private place() {
    return { monitor: this.client.name, id: this.id, type: this.latest?.type ?? 'block' };
  }

  private nap(): Promise<void> {
    if (this.woken) {
      this.woken = false;
      return Promise.resolve();
    }
    const { pollMs = this.client.hasEvents ? POLL_MS : POLL_EVENTLESS_MS } = this.options;
    return new Promise((resolve) => {
      const sleepOn = this.wake;
      const timer = setTimeout(() => this.wake(), pollMs);
      this.wake = () => {
        clearTimeout(timer);
        this.wake = sleepOn;
        resolve();
      };
    });
  }

  private note({ name, data }: QmpEvent): void {
    const concerned = name === 'JOB_STATUS_CHANGE' ? data['id'] : data['device'];
    if (concerned !== this.id || !/^(BLOCK_)?JOB_/.test(name)) return;
    if (name === 'BLOCK_JOB_COMPLETED') this.hear(data, typeof data['error'] === 'string' ? data['error'] : null);
    if (name === 'BLOCK_JOB_CANCELLED') this.hear(data, 'Operation canceled');
    this.wake();
  }

  private hear({ offset, len }: QmpEvent['data'], error: string | null): void {
    this.lastWords = { error, position: Number(offset), total: Number(len) };
  }

  /** Apart from the watch, so that a listener's fault does not end it. */
  private tell(): void {
    const progress = this.progress();
    if (progress) queueMicrotask(() => this.emit('progress', progress));
  }

  /** As it was at the last look; null before the first. */
  progress(): JobProgress | null {
    if (!this.latest) return null;
    const { id, type, position, total, ioStatus } = this.latest;
    const state = stateOf(this.latest);
    const rate = this.rate.note(performance.now(), position);
    const secondsLeft = rate > 0 && state === 'running' ? (total - position) / rate : null;
    return { id, type, state, ioStatus, position, total, rate, secondsLeft };
  }

  /** Most bytes a second from now on; Infinity for no limit. Throws RANGE unless above 0. */
  setSpeed(bytesPerSecond: number): Promise<void> {
    return this.steer({ speed: bytesPerSecond });
  }

  /** Takes effect after the request in flight; `progress` tells. */
  pause(): Promise<void> {
    return this.steer('pause');
  }

  /** Also after an error that paused it: what failed is tried again. */
  resume(): Promise<void> {
    return this.steer('resume');
  }

  /** The end is told by `outcome`. Does nothing where the job has ended. */
  async cancel(): Promise<void> {
    if (this.over) return;
    await this.steer('cancel').catch((error: unknown) => {
      // It has ended, and somebody was quicker to dismiss it.
      if (!(error instanceof ThickenError) || error.code !== 'UNKNOWN_JOB') throw error;
    });
  }

  /** Ends a job that is `ready` (commit of an active image, mirror) well. */
  complete(): Promise<void> {
    return this.steer('complete');
  }

  /** Lets a `pending` job change the graph, where `autoFinalize` is off. */
  finalize(): Promise<void> {
    return this.steer('finalize');
  }

  private async steer(how: Steering): Promise<void> {
    await control(this.client, this.id, how);
    this.wake();
  }

  /** Cancels a job that was started from here, and waits for its end; else only stops watching. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.leaving = true;
    if (!this.own) this.stop();
    else await this.cancel().catch(() => this.stop());
    await this.outcome.catch(() => undefined);
  }

  private stop(): void {
    this.stopped = true;
    this.wake();
  }
}

/**
 * Starts a block-stream. Throws QMP_COMMAND where QEMU refuses, RANGE, CANCELLED. A job that starts
 * after nobody waits for it any more is cancelled.
 */
export function startStream(
  client: QmpClient,
  options: StreamOptions,
  follow: FollowOptions = {},
): Promise<BlockJob> {
  return start(client, 'block-stream', streamArguments(options), follow);
}

/** The same for a block-commit; of the active image it becomes `ready`, and wants `complete`. */
export function startCommit(
  client: QmpClient,
  args: Omit<CommitArguments, 'auto-dismiss'>,
  follow: FollowOptions = {},
): Promise<BlockJob> {
  return start(client, 'block-commit', args, follow);
}

async function start(
  client: QmpClient,
  command: 'block-stream' | 'block-commit',
  args: StreamArguments | CommitArguments,
  follow: FollowOptions,
): Promise<BlockJob> {
  if (follow.signal?.aborted) throw common.cancelled(client.name);
  const id = args['job-id'];
  const disown = () => void new BlockJob(client, id, true)[Symbol.asyncDispose]();
  await client.executeAny(command, { ...args, 'auto-dismiss': false }, { late: disown });
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
