import type { ThickenError } from '../errors.js';

/** Bytes that arrive in pieces and are taken in others, one taker at a time. */
export class Inbox {
  private bytes: Buffer = Buffer.alloc(0);
  private failure: ThickenError | undefined;
  private waiting: { length: number; resolve(bytes: Buffer): void; reject(error: Error): void } | undefined;

  /** Bytes that have come and not been taken. */
  get size(): number {
    return this.bytes.length;
  }

  add(chunk: Buffer): void {
    this.bytes = this.bytes.length === 0 ? chunk : Buffer.concat([this.bytes, chunk]);
    const { waiting } = this;
    if (!waiting || this.bytes.length < waiting.length) return;
    this.waiting = undefined;
    waiting.resolve(this.cut(waiting.length));
  }

  /** What has come before can still be taken. */
  fail(error: ThickenError): void {
    this.failure ??= error;
    this.waiting?.reject(error);
    this.waiting = undefined;
  }

  /** The next `length` bytes. Rejects with the failure where they never come. */
  take(length: number): Promise<Buffer> {
    if (this.bytes.length >= length) return Promise.resolve(this.cut(length));
    if (this.failure) return Promise.reject(this.failure);
    return new Promise((resolve, reject) => (this.waiting = { length, resolve, reject }));
  }

  /** Whatever has come. */
  rest(): Buffer {
    return this.cut(this.bytes.length);
  }

  private cut(length: number): Buffer {
    const taken = this.bytes.subarray(0, length);
    this.bytes = this.bytes.subarray(length);
    return taken;
  }
}
