/** Where one JSON object ends and the next begins, in a stream of bytes from a peer. Pure. */

/**
 * Bytes of one message. `query-qmp-schema` takes 0.1 MiB in a storage daemon and 0.2 in an emulator
 * (QEMU 7.2); the largest known is `query-named-block-nodes` without `flat`, which repeats the rest
 * of the chain for every node: some 45 MiB for 300 layers of backing.
 */
export const MOST_MESSAGE_BYTES = 64 * 2 ** 20;
/** QEMU's own limit for what it reads (json-parser, MAX_NESTING). */
export const MOST_NESTING = 1024;

const FIRST_BUFFER_BYTES = 4096;

export interface WireLimits {
  bytes: number;
  nesting: number;
}

export type JsonObject = Record<string, unknown>;

/** What came is no stream of JSON objects, or goes beyond the limits. */
export class WireError extends Error {}

const SPACE = new Set([0x20, 0x09, 0x0a, 0x0d]);
const QUOTE = 0x22;
const BACKSLASH = 0x5c;
const OPEN_BRACE = 0x7b;
const CLOSE_BRACE = 0x7d;
const OPEN_BRACKET = 0x5b;
const CLOSE_BRACKET = 0x5d;

/**
 * Takes chunks cut anywhere, gives whole objects. A message ends with its closing brace and not
 * with the line, so that a monitor with `pretty=on`, which sends many lines, is understood too.
 * Depth and size are limited while bytes come, before anything is parsed. After an error the
 * decoder is of no more use.
 */
export class ObjectDecoder {
  private held = new Uint8Array(FIRST_BUFFER_BYTES);
  private length = 0;
  private depth = 0;
  private inString = false;
  private escaped = false;
  private readonly text = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

  constructor(private readonly limits: WireLimits = { bytes: MOST_MESSAGE_BYTES, nesting: MOST_NESTING }) {}

  /** Whether a message has begun and not ended. */
  get partial(): boolean {
    return this.depth > 0;
  }

  /** Throws WireError; what came before the fault has been given to `take` by then. */
  push(chunk: Uint8Array, take: (value: JsonObject, bytes: number) => void): void {
    let first = 0;
    for (let i = 0; i < chunk.length; i++) {
      const byte = chunk[i] ?? 0;
      if (this.depth === 0 && SPACE.has(byte)) {
        first = i + 1;
        continue;
      }
      if (!this.step(byte)) continue;
      this.keep(chunk.subarray(first, i + 1));
      first = i + 1;
      this.finish(take);
    }
    this.keep(chunk.subarray(first));
  }

  /** Whether `byte` ends a message. */
  private step(byte: number): boolean {
    if (this.inString) {
      this.stepInString(byte);
      return false;
    }
    if (this.depth === 0 && byte !== OPEN_BRACE) throw new WireError('a message that is no JSON object');
    if (byte === QUOTE) this.inString = true;
    else if (byte === OPEN_BRACE || byte === OPEN_BRACKET) this.deepen();
    else if (byte === CLOSE_BRACE || byte === CLOSE_BRACKET) return --this.depth === 0;
    return false;
  }

  private stepInString(byte: number): void {
    if (byte < 0x20) throw new WireError('a control character inside a string');
    if (this.escaped) this.escaped = false;
    else if (byte === BACKSLASH) this.escaped = true;
    else if (byte === QUOTE) this.inString = false;
  }

  private deepen(): void {
    this.depth++;
    if (this.depth > this.limits.nesting) {
      throw new WireError(`a message nested more than ${this.limits.nesting} levels deep`);
    }
  }

  /** In one buffer that doubles: a list of chunks would cost far more than their bytes. */
  private keep(part: Uint8Array): void {
    const length = this.length + part.length;
    if (length > this.limits.bytes) {
      throw new WireError(`a message of more than ${this.limits.bytes} bytes`);
    }
    if (length > this.held.length) {
      const larger = new Uint8Array(Math.max(length, Math.min(2 * this.held.length, this.limits.bytes)));
      larger.set(this.held.subarray(0, this.length));
      this.held = larger;
    }
    this.held.set(part, this.length);
    this.length = length;
  }

  private finish(take: (value: JsonObject, bytes: number) => void): void {
    const bytes = this.length;
    const value = this.parse(this.held.subarray(0, bytes));
    this.length = 0;
    if (this.held.length > FIRST_BUFFER_BYTES) this.held = new Uint8Array(FIRST_BUFFER_BYTES);
    take(value, bytes);
  }

  private parse(bytes: Uint8Array): JsonObject {
    try {
      return JSON.parse(this.text.decode(bytes)) as JsonObject;
    } catch {
      throw new WireError('a message that is neither JSON nor UTF-8');
    }
  }
}
