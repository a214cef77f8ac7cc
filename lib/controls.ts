/** How a run is steered while it goes on: limits, pause, cancel. */
import { errors, rangeError } from './errors.js';
import { native, type CancelFlag } from './native.js';
import { Throttle } from './throttle.js';

/** Work that somebody else does, at a pace of its own: it is told instead of held back. */
export interface Steered {
  setSpeed(bytesPerSecond: number): void;
  pause(): void;
  resume(): void;
}

export class Controls {
  private readonly controller = new AbortController();
  readonly cancelFlag: CancelFlag = Object.assign(new (native().CancelFlag)(), {
    signal: this.controller.signal,
  });
  private gate: { opened: Promise<void>; open: () => void } | undefined;
  private speed = Infinity;
  private iops = Infinity;
  /** Made when the run begins, so that no time is counted before. */
  private bucket: Throttle | undefined;
  private steered: Steered | undefined;

  constructor(private readonly path: string) {}

  get signal(): AbortSignal {
    return this.controller.signal;
  }

  get paused(): boolean {
    return this.gate !== undefined;
  }

  get throttle(): Throttle {
    return (this.bucket ??= new Throttle(this.speed, this.iops));
  }

  limits(): { speed: number; iops: number } {
    return { speed: this.speed, iops: this.iops };
  }

  /** Whether anything changed. */
  pause(): boolean {
    if (this.gate) return false;
    let open = () => {};
    const opened = new Promise<void>((resolve) => (open = resolve));
    this.gate = { opened, open };
    this.steered?.pause();
    return true;
  }

  resume(): void {
    if (!this.gate) return;
    this.bucket?.forgive();
    this.gate.open();
    this.gate = undefined;
    this.steered?.resume();
  }

  setSpeed(bytesPerSecond: number): void {
    this.speed = checkLimit('speed', bytesPerSecond);
    this.bucket?.setSpeed(this.speed);
    this.steered?.setSpeed(this.speed);
  }

  setIops(requestsPerSecond: number): void {
    this.iops = checkLimit('iops', requestsPerSecond);
    this.bucket?.setIops(this.iops);
  }

  cancel(): void {
    this.cancelFlag.cancel();
    this.controller.abort();
    this.gate?.open();
  }

  /** From now on `steered` is told too; what was said before is passed on. */
  steer(steered: Steered | undefined): void {
    this.steered = steered;
    if (steered && this.paused) steered.pause();
  }

  async unpaused(): Promise<void> {
    while (this.gate && !this.signal.aborted) await this.gate.opened;
  }

  throwIfCancelled(): void {
    if (this.signal.aborted) throw errors.cancelled(this.path);
  }
}

function checkLimit(name: string, value: unknown): number {
  if (typeof value === 'number' && value > 0) return value;
  throw rangeError(`${name} is ${String(value)}`, 'give a number above 0');
}
