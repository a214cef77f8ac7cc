import type { Clock } from '../../lib/throttle.js';

/** Time that passes only while somebody sleeps; what is scheduled happens in between. */
export class VirtualClock implements Clock {
  private time = 0;
  private readonly events: { at: number; happen: () => void }[] = [];

  /** `late` gives the milliseconds by which each timer fires late. */
  constructor(private readonly late: () => number = () => 0) {}

  now(): number {
    return this.time;
  }

  schedule(at: number, happen: () => void): void {
    this.events.push({ at, happen });
    this.events.sort((a, b) => a.at - b.at);
  }

  async sleep(ms: number, signal: AbortSignal): Promise<void> {
    // As with any timer, some time goes by even where almost none was asked for.
    const end = this.time + Math.max(0.001, ms) + this.late();
    while (!signal.aborted) {
      const event = this.events[0];
      if (!event || event.at > end) {
        this.time = end;
        return;
      }
      this.events.shift();
      this.time = Math.max(this.time, event.at);
      event.happen();
    }
  }

  /** Lets time go by in which nobody asks for anything. */
  pass(ms: number): Promise<void> {
    return this.sleep(ms, new AbortController().signal);
  }
}
