/** Events of a connection, for those who want them. */
import type { ThickenError } from '../errors.js';
import { unhurried, watchLimits, type WaitLimits } from './limits.js';
import type { QmpEvent } from './message.js';

export type EventFilter = string | readonly string[] | ((event: QmpEvent) => boolean);

export const DEFAULT_QUEUE = 256;

interface Subscriber {
  offer(event: QmpEvent): void;
  /** null: the connection was closed from this side. */
  end(error: ThickenError | null): void;
}

function matcher(filter: EventFilter): (event: QmpEvent) => boolean {
  if (typeof filter === 'function') return filter;
  const names = new Set(typeof filter === 'string' ? [filter] : filter);
  return (event) => names.has(event.name);
}

/** Hands each event to whoever has subscribed by then. */
export class EventHub {
  private readonly subscribers = new Set<Subscriber>();
  private ended: { error: ThickenError | null } | undefined;

  publish(event: QmpEvent): void {
    for (const subscriber of [...this.subscribers]) subscriber.offer(event);
  }

  end(error: ThickenError | null): void {
    this.ended ??= { error };
    for (const subscriber of [...this.subscribers]) subscriber.end(error);
    this.subscribers.clear();
  }

  /** Returns what ends it. */
  subscribe(subscriber: Subscriber): () => void {
    if (this.ended) subscriber.end(this.ended.error);
    else this.subscribers.add(subscriber);
    return () => void this.subscribers.delete(subscriber);
  }

  stream(filter: EventFilter, limit: number): EventStream {
    return new EventStream(this, matcher(filter), limit);
  }

  /** The first event that matches from now on. */
  waitFor(
    filter: EventFilter,
    limits: WaitLimits,
    errors: {
      timeout: () => ThickenError;
      cancelled: (reason: unknown) => ThickenError;
      closed: () => ThickenError;
    },
  ): Promise<QmpEvent> {
    const stream = this.stream(filter, 1);
    const found = new Promise<QmpEvent>((resolve, reject) => {
      const stop = watchLimits(limits, reject, errors);
      const settle = ({ value }: { value: QmpEvent | undefined }) =>
        value ? resolve(value) : reject(errors.closed());
      stream.next().then(settle, reject).finally(stop).catch(reject);
    });
    return unhurried(found.finally(() => stream.dispose()));
  }
}

/**
 * Events that match, in the order in which they came. The queue is bounded: when it is full the
 * oldest event goes, and `overflowed` counts it. The latest is what tells how things are, and
 * whoever missed one must ask by query anyway. Ends when disposed or when the connection is closed;
 * throws the connection's error, after what had come before, when that was lost.
 */
export class EventStream implements AsyncIterableIterator<QmpEvent>, AsyncDisposable {
  private readonly queue: QmpEvent[] = [];
  private readonly takers: {
    resolve: (result: IteratorResult<QmpEvent, undefined>) => void;
    reject: (error: unknown) => void;
  }[] = [];
  private ended: { error: Error | null } | undefined;
  private dropped = 0;
  private readonly unsubscribe: () => void;

  constructor(
    hub: EventHub,
    private readonly matches: (event: QmpEvent) => boolean,
    private readonly limit: number,
  ) {
    this.unsubscribe = hub.subscribe({
      offer: (event) => this.offer(event),
      end: (error) => this.end(error),
    });
  }

  /** How many events were dropped because nobody took them in time. */
  get overflowed(): number {
    return this.dropped;
  }

  private offer(event: QmpEvent): void {
    if (this.ended) return;
    try {
      if (!this.matches(event)) return;
    } catch (error) {
      // The filter is the caller's; its fault must reach the caller, and not the connection.
      return this.fail(error);
    }
    const taker = this.takers.shift();
    if (taker) return taker.resolve({ done: false, value: event });
    this.queue.push(event);
    if (this.queue.length <= this.limit) return;
    this.queue.shift();
    this.dropped++;
  }

  private fail(error: unknown): void {
    this.unsubscribe();
    this.end(error instanceof Error ? error : new Error(String(error)));
  }

  private end(error: Error | null): void {
    if (this.ended) return;
    this.ended = { error };
    for (const taker of this.takers.splice(0)) {
      if (error) taker.reject(error);
      else taker.resolve({ done: true, value: undefined });
    }
  }

  next(): Promise<IteratorResult<QmpEvent, undefined>> {
    const event = this.queue.shift();
    if (event) return Promise.resolve({ done: false, value: event });
    return unhurried(
      new Promise((resolve, reject) => {
        if (!this.ended) this.takers.push({ resolve, reject });
        else if (this.ended.error) reject(this.ended.error);
        else resolve({ done: true, value: undefined });
      }),
    );
  }

  /** Ends the stream; what is queued is forgotten. */
  dispose(): void {
    this.unsubscribe();
    this.queue.length = 0;
    this.end(null);
    this.ended = { error: null };
  }

  return(): Promise<IteratorResult<QmpEvent, undefined>> {
    this.dispose();
    return Promise.resolve({ done: true, value: undefined });
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.dispose();
    return Promise.resolve();
  }
}
