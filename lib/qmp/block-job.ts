/** One block job, watched to its end. */
import { EventEmitter } from 'node:events';
import { ThickenError, toThickenError } from '../errors.js';
import { RateMeter } from '../pace.js';
import type { QmpClient } from './client.js';
import type { IoStatus } from './commands.js';
import { jobErrors } from './errors.js';
import { control, dismiss, type Steering } from './job-control.js';
import {
  outcomeOf,
  sampleJobs,
  stateOf,
  type Ending,
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
  /** Cancels the job; where QEMU does not answer that, `outcome` rejects and the job is left. */
  signal?: AbortSignal | undefined;
}

export interface StartOptions extends FollowOptions {
  /**
   * Called when all is copied and the graph is about to change; where it throws, the job is
   * cancelled, and has failed with that error. This is the place to flush the image, by an NBD
   * export: at its end a block-stream takes the backing file out of the header while the tables
   * that map the copies may be in QEMU's memory only. A QEMU killed within that time has lost them
   * (seen with 7.2: not one cluster was mapped).
   */
  beforeFinalize?: (() => Promise<void>) | undefined;
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
  private settled = false;
  /** Why the job was undone before it was finalized. */
  private spoiled: ThickenError | undefined;
  /** What an event said about the end. */
  private lastWords: Ending | undefined;
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
    private readonly options: StartOptions = {},
  ) {
    super();
    this.outcome = unhurried(this.follow());
  }

  private async follow(): Promise<JobOutcome> {
    const { signal } = this.options;
    const onAbort = () => {
      // Who aborts wants an end, also where QEMU hangs and the job can't be cancelled.
      this.leaving = true;
      void this.cancel().catch(() => this.stop());
    };
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
        if (sample.status === 'pending') await this.settle();
      }
      await this.nap();
    }
  }

  /** null: there is no such job; undefined: QEMU is too busy to say, as it may be with slow storage. */
  private async look(): Promise<JobSample | null | undefined> {
    try {
      return (await sampleJobs(this.client)).find(({ id }) => id === this.id) ?? null;
    } catch (error) {
      this.bear(error);
      return undefined;
    }
  }

  /** The next look will tell more, where QEMU was too slow to answer. */
  private bear(error: unknown): void {
    const slow = error instanceof ThickenError && error.code === 'QMP_TIMEOUT';
    if (!slow || this.leaving) throw error;
  }

  /** Where there is nothing to do before, finalizing is left to whoever turned it off. */
  private async settle(): Promise<void> {
    const { beforeFinalize } = this.options;
    if (!beforeFinalize) return;
    if (!this.settled) {
      const done = Promise.resolve().then(beforeFinalize);
      await done.catch((error: unknown) => (this.spoiled = toThickenError(error)));
      this.settled = true;
    }
    try {
      await control(this.client, this.id, this.spoiled ? 'cancel' : 'finalize').catch(ifGone);
      this.wake();
    } catch (error) {
      this.bear(error);
    }
  }

  private async conclude(sample: JobSample): Promise<JobOutcome> {
    // The outcome is known; a connection that breaks now does not change it.
    if (this.own) await dismiss(this.client, this.id).catch(() => undefined);
    return this.judge(sample);
  }

  private vanished(): JobOutcome {
    if (!this.lastWords) throw jobErrors.gone(this.place());
    return this.judge(this.lastWords);
  }

  private judge({ error, position, total }: Ending): JobOutcome {
    if (this.spoiled) return { status: 'failed', position, total, error: this.spoiled };
    return outcomeOf(this.place(), { error, position, total });
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
    await this.steer('cancel').catch(ifGone);
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

  /**
   * Cancels a job that was started from here, and waits for its end (and for `beforeFinalize`); else
   * only stops watching. A job is left where QEMU is gone or does not answer.
   */
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

/** The job has ended, and somebody was quicker to dismiss it: the next look finds that out. */
function ifGone(error: unknown): void {
  if (!(error instanceof ThickenError) || error.code !== 'UNKNOWN_JOB') throw error;
}
