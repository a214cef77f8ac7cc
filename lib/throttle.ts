/** Time as the throttle needs it; a test injects its own. */
export interface Clock {
  /** Milliseconds, monotonic. */
  now(): number;
  /** Resolves after `ms` (or before, where that is very long), or at once when `signal` aborts. */
  sleep(ms: number, signal: AbortSignal): Promise<void>;
}

/** setTimeout takes more for 1 ms; whoever sleeps looks at the clock again. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;

export const systemClock: Clock = {
  now: () => performance.now(),
  sleep: (ms, signal) =>
    new Promise((resolve) => {
      if (signal.aborted) return resolve();
      const done = () => {
        clearTimeout(timer);
        signal.removeEventListener('abort', done);
        resolve();
      };
      const timer = setTimeout(done, Math.min(ms, LONGEST_TIMER_MS));
      signal.addEventListener('abort', done);
    }),
};

/** What may come out as one burst: it makes good for timers that fire late. */
const SAVED_SECONDS = 0.02;
/** What a disk that stalls may fall behind and still catch up with, and how much faster it then goes. */
const BEHIND_SECONDS = 1;
const CATCH_UP = 0.25;

/**
 * One token bucket that may go into debt: whoever finds it out of debt takes all that it needs and
 * goes, and the next one waits until the debt has been earned back. So a request larger than the
 * bucket passes, and the average still holds from the first request on. What a full bucket could
 * not take in (the disk was busy for longer) flows back slowly, so that it makes no burst.
 */
class Bucket {
  private level = 0;
  /** Not used in its time; comes on top of the rate. */
  private behind = 0;
  private updated: number;

  constructor(
    private rate: number,
    now: number,
  ) {
    this.updated = now;
  }

  setRate(rate: number, now: number): void {
    this.earn(now);
    if (!Number.isFinite(rate)) this.level = 0;
    this.rate = rate;
    this.behind = 0;
  }

  forgive(now: number): void {
    this.earn(now);
    this.behind = 0;
  }

  /** Whole milliseconds until the bucket is out of debt. */
  wait(now: number): number {
    this.earn(now);
    if (this.level >= 0) return 0;
    const caughtUp = Math.min(this.behind, (-this.level * CATCH_UP) / (1 + CATCH_UP));
    return Math.ceil(((-this.level - caughtUp) / this.rate) * 1000);
  }

  take(amount: number): void {
    if (Number.isFinite(this.rate)) this.level -= amount;
  }

  private earn(now: number): void {
    const seconds = (now - this.updated) / 1000;
    this.updated = now;
    if (!Number.isFinite(this.rate)) return;
    const earned = seconds * this.rate;
    const caughtUp = Math.min(this.behind, earned * CATCH_UP);
    const level = this.level + earned + caughtUp;
    this.level = Math.min(this.rate * SAVED_SECONDS, level);
    this.behind = Math.min(this.rate * BEHIND_SECONDS, this.behind - caughtUp + level - this.level);
  }
}

/** Limits bytes and requests a second; both limits can be changed while requests wait. */
export class Throttle {
  private readonly bytes: Bucket;
  private readonly requests: Bucket;
  private waiting: AbortController | undefined;
  private queue: Promise<void> = Promise.resolve();

  /** `speed` in bytes a second, `iops` in requests a second; Infinity for no limit. */
  constructor(
    speed: number,
    iops: number,
    private readonly clock: Clock = systemClock,
  ) {
    this.bytes = new Bucket(speed, clock.now());
    this.requests = new Bucket(iops, clock.now());
  }

  setSpeed(speed: number): void {
    this.bytes.setRate(speed, this.clock.now());
    this.wake();
  }

  setIops(iops: number): void {
    this.requests.setRate(iops, this.clock.now());
    this.wake();
  }

  /** Time that was let pass on purpose (a pause) is not caught up with. */
  forgive(): void {
    const now = this.clock.now();
    this.bytes.forgive(now);
    this.requests.forgive(now);
  }

  /**
   * Resolves when `bytes` in `requests` may go, in the order of the calls. Resolves early when
   * `signal` aborts, having taken nothing.
   */
  take(bytes: number, requests: number, signal: AbortSignal): Promise<void> {
    const turn = this.queue.then(() => this.takeTurn(bytes, requests, signal));
    this.queue = turn;
    return turn;
  }

  private async takeTurn(bytes: number, requests: number, signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      const now = this.clock.now();
      const wait = Math.max(this.bytes.wait(now), this.requests.wait(now));
      if (wait === 0) {
        this.bytes.take(bytes);
        this.requests.take(requests);
        return;
      }
      await this.sleep(wait, signal);
    }
  }

  /** Turns follow each other, so that at most one sleeps. */
  private async sleep(ms: number, signal: AbortSignal): Promise<void> {
    const waiting = new AbortController();
    const wake = () => waiting.abort();
    this.waiting = waiting;
    signal.addEventListener('abort', wake);
    await this.clock.sleep(ms, waiting.signal);
    signal.removeEventListener('abort', wake);
    this.waiting = undefined;
  }

  private wake(): void {
    this.waiting?.abort();
  }
}
