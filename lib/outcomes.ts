/** What was done by work of several parts, some of which may have failed. */
import { ThickenError } from './errors.js';
import { NO_WORK, type Work } from './native.js';

/**
 * The sum of all, when none is under way any more. Rejects with the first failure; what was done in
 * spite of it still counts, as its cause's `partial`. That is an error of its own for each chunk: a
 * lost connection rejects all of them with one.
 */
export async function allOf(requests: readonly Promise<Work>[]): Promise<Work> {
  const outcomes = await Promise.allSettled(requests);
  let done = NO_WORK;
  for (const outcome of outcomes) {
    if (outcome.status === 'fulfilled') done = plus(outcome.value, done);
  }
  const failed = outcomes.find((outcome) => outcome.status === 'rejected');
  if (failed) throw withPartial(failed.reason, done);
  return done;
}

/** Both, and how the second ended. */
export function plus(first: Work, second: Work): Work {
  return {
    ...second,
    allocated: first.allocated + second.allocated,
    skipped: first.skipped + second.skipped,
    requests: first.requests + second.requests,
  };
}

/** `reason` again, as an error of its own. */
export function withPartial(reason: unknown, partial: Work): unknown {
  if (!(reason instanceof ThickenError)) return reason;
  return new ThickenError(reason.code, reason.message, { ...reason, cause: { partial, cause: reason } });
}

/** What was done in spite of a failure. Calls that read have partial results too, and those are no work. */
export function partialOf(error: unknown): Work {
  const partial = (error as { cause?: { partial?: Partial<Work> } }).cause?.partial;
  return typeof partial?.allocated === 'number' ? { ...NO_WORK, ...partial } : NO_WORK;
}
