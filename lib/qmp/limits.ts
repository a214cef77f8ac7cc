/** How long somebody waits. */
import type { ThickenError } from '../errors.js';

export interface WaitLimits {
  /** Milliseconds; Infinity for no limit. */
  timeoutMs?: number | undefined;
  signal?: AbortSignal | undefined;
}

/** setTimeout takes more for 1 ms. */
const LONGEST_TIMER_MS = 2 ** 31 - 1;

/**
 * Calls `fail` once, when the time is up or the signal aborts (at once, if it has already). Returns
 * what ends the watch.
 */
export function watchLimits(
  { timeoutMs = Infinity, signal }: WaitLimits,
  fail: (error: ThickenError) => void,
  errors: { timeout: () => ThickenError; cancelled: (reason: unknown) => ThickenError },
): () => void {
  const onAbort = () => end(errors.cancelled(signal?.reason));
  const timer =
    timeoutMs <= LONGEST_TIMER_MS ? setTimeout(() => end(errors.timeout()), timeoutMs) : undefined;
  const stop = () => {
    clearTimeout(timer);
    signal?.removeEventListener('abort', onAbort);
  };
  const end = (error: ThickenError) => {
    stop();
    fail(error);
  };
  if (signal?.aborted) onAbort();
  else signal?.addEventListener('abort', onAbort);
  return stop;
}

/** `promise`, whose rejection does not end the process where nobody awaits it. */
export function unhurried<T>(promise: Promise<T>): Promise<T> {
  promise.catch(() => undefined);
  return promise;
}
