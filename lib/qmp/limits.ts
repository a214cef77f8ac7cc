/** How long somebody waits. */
import { setMaxListeners } from 'node:events';
import type { ThickenError } from '../errors.js';

export interface WaitLimits {
  /** Milliseconds; Infinity for no limit. */
  timeoutMs?: number | undefined;
  signal?: AbortSignal | undefined;
}

/** setTimeout takes more for 1 ms. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;

/**
 * Calls `fail` once, when the time is up or the signal aborts; never before it has returned what
 * ends the watch.
 */
export function watchLimits(
  { timeoutMs = Infinity, signal }: WaitLimits,
  fail: (error: ThickenError) => void,
  errors: { timeout: () => ThickenError; cancelled: (reason: unknown) => ThickenError },
): () => void {
  const onAbort = () => end(errors.cancelled(signal?.reason));
  const timer =
    timeoutMs <= LONGEST_TIMER_MS ? setTimeout(() => end(errors.timeout()), timeoutMs) : undefined;
  let over = false;
  const stop = () => {
    over = true;
    clearTimeout(timer);
    signal?.removeEventListener('abort', onAbort);
  };
  const end = (error: ThickenError) => {
    if (over) return;
    stop();
    fail(error);
  };
  if (signal?.aborted) queueMicrotask(onAbort);
  else if (signal) {
    // One signal for many commands is no leak; Node warns of eleven listeners, on stderr.
    setMaxListeners(0, signal);
    signal.addEventListener('abort', onAbort);
  }
  return stop;
}

/** `promise`, whose rejection does not end the process where nobody awaits it. */
export function unhurried<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}
