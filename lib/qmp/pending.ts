/** The commands of a connection that have no answer yet. */
import type { ThickenError } from '../errors.js';

/**
 * Commands without an answer, those that nobody waits for any more included: QEMU takes them one
 * after the other, so a hung one would let both lists grow.
 */
export const MOST_OUTSTANDING = 1024;

/** Exactly one of the two is called, once. */
export interface Waiting {
  command: string;
  answered: (value: unknown) => void;
  failed: (error: ThickenError) => void;
}

export type Late = (value: unknown) => void;

export class Outstanding {
  private readonly waiting = new Map<number, Waiting>();
  private readonly abandoned = new Map<number, Late | undefined>();
  private last = 0;

  get full(): boolean {
    return this.waiting.size + this.abandoned.size >= MOST_OUTSTANDING;
  }

  /** Returns the id. Ids are never used twice in a connection. */
  add(waiting: Waiting): number {
    this.waiting.set(++this.last, waiting);
    return this.last;
  }

  /** Nobody waits for `id` any more; if it succeeds yet, `late` is told. */
  abandon(id: number, late?: Late): void {
    if (this.waiting.delete(id)) this.abandoned.set(id, late);
  }

  /** Whom an answer is for; undefined if there is no such command. */
  take(id: number): Waiting | { late: Late | undefined } | undefined {
    const waiting = this.waiting.get(id);
    if (waiting) {
      this.waiting.delete(id);
      return waiting;
    }
    if (!this.abandoned.has(id)) return undefined;
    const late = this.abandoned.get(id);
    this.abandoned.delete(id);
    return { late };
  }

  failAll(error: ThickenError): void {
    const failing = [...this.waiting.values()];
    this.waiting.clear();
    this.abandoned.clear();
    for (const { failed } of failing) failed(error);
  }
}
