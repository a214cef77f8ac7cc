/**
 * How the reply to one request is put together, and what it has to be. A reply arrives in chunks,
 * in any order; each is a few fixed bytes and a body, which is copied once, into its place.
 */
import { CHUNK, decodeOffset, decodeUint32, MOST_STRING } from './protocol.js';

/** The reply breaks the protocol; the connection adds whose it is. */
export class BadReply extends Error {}

const NOTHING = Buffer.alloc(0);
/** An error chunk: number, length of the message, message, offset. */
const MOST_ERROR = 6 + MOST_STRING + 8;
/** Errors that one reply may tell of. */
const MOST_ERRORS = 64;

export abstract class Reply<T> {
  /** The first error that the reply told of. */
  error: { errno: number; message: string; offset: number | undefined } | undefined;
  /** Bytes that the connection was told of, and holds until the reply is complete. */
  heldBytes = 0;
  private errorCount = 0;

  /** What the request resolves with. Throws BadReply where the reply is not complete. */
  abstract result(): T;

  /** Where the bytes after a simple reply without error go. */
  simple(): Buffer {
    return NOTHING;
  }

  /** How many fixed bytes a chunk starts with. Throws BadReply where it can't be of this reply. */
  fixedBytes(type: number, length: number): number {
    if (type === CHUNK.NONE && length === 0) return 0;
    throw new BadReply(`a chunk of type ${type} and ${length} bytes is no answer to the request`);
  }

  /** Takes the fixed bytes, at `at`, and says where the body goes. */
  start(_type: number, _length: number, _bytes: Uint8Array, _at: number): Buffer {
    return NOTHING;
  }

  /** The body is complete. */
  end(): void {}

  /** Checks an error chunk's length; its bytes are collected by the connection. */
  addError(errno: number, message: string, offset: number | undefined): void {
    if (++this.errorCount > MOST_ERRORS) throw new BadReply('a reply tells of too many errors');
    this.error ??= { errno, message, offset };
  }
}

export function checkErrorLength(length: number): void {
  if (length < 6 || length > MOST_ERROR) throw new BadReply('an error chunk has a wrong length');
}

/** The reply to a command that returns nothing. */
export class PlainReply extends Reply<void> {
  result(): void {}
}

/** Pieces of a reply that don't touch, at most. Servers send them in order, or nearly. */
const MOST_PIECES = 4096;

/** The reply to READ: every byte has to come exactly once. */
export class ReadReply extends Reply<Buffer> {
  /** Made when the first bytes come: requests that wait in a queue hold no memory. */
  private data = NOTHING;
  /** What has come: starts and ends, flat and ascending; neighbours are merged. */
  private readonly pieces: number[] = [];

  constructor(
    private readonly offset: number,
    private readonly length: number,
    private readonly structured: boolean,
  ) {
    super();
  }

  result(): Buffer {
    const { pieces } = this;
    if (pieces.length !== 2 || pieces[0] !== 0 || pieces[1] !== this.length) {
      throw new BadReply('a reply to READ lacks some of the bytes');
    }
    return this.data;
  }

  override simple(): Buffer {
    if (this.structured) throw new BadReply('a reply to READ is not structured');
    this.add(0, this.length);
    return this.data;
  }

  override fixedBytes(type: number, length: number): number {
    if (type === CHUNK.OFFSET_DATA && length > 8 && length <= 8 + this.length) return 8;
    if (type === CHUNK.OFFSET_HOLE && length === 12) return 12;
    return super.fixedBytes(type, length);
  }

  override start(type: number, length: number, bytes: Uint8Array, at: number): Buffer {
    if (type === CHUNK.NONE) return NOTHING;
    const hole = type === CHUNK.OFFSET_HOLE;
    const start = decodeOffset(bytes, at) - this.offset;
    const end = start + (hole ? decodeUint32(bytes, at + 8) : length - 8);
    if (start < 0 || end > this.length || start >= end) {
      throw new BadReply('a chunk lies outside of what was read');
    }
    this.add(start, end);
    if (!hole) return this.data.subarray(start, end);
    this.data.fill(0, start, end);
    return NOTHING;
  }

  private add(start: number, end: number): void {
    const { pieces } = this;
    // Not cleared: the result is given out only when each byte has been written.
    if (pieces.length === 0) this.data = Buffer.allocUnsafe(this.length);
    let at = pieces.length;
    while (at > 0 && pieces[at - 1]! > start) at--;
    // An odd place is within a piece; and the next one must not begin before the end.
    if (at % 2 === 1 || (at < pieces.length && pieces[at]! < end)) {
      throw new BadReply('a chunk repeats bytes of another');
    }
    const joinsBefore = at > 0 && pieces[at - 1] === start;
    const joinsAfter = at < pieces.length && pieces[at] === end;
    pieces.splice(
      joinsBefore ? at - 1 : at,
      (joinsBefore ? 1 : 0) + (joinsAfter ? 1 : 0),
      ...(joinsBefore ? [] : [start]),
      ...(joinsAfter ? [] : [end]),
    );
    if (pieces.length > 2 * MOST_PIECES) throw new BadReply('a reply is in too many pieces');
  }
}

/** What one meta context says of consecutive extents from the asked offset on. */
export interface ContextStatus {
  context: string;
  /** Bytes that the extents cover together; at most what was asked. */
  length: number;
  /** Bytes of each extent. */
  lengths: Uint32Array;
  /** The context's number of each: STATE_* bits of base:allocation, a depth of qemu:allocation-depth. */
  flags: Uint32Array;
}

/** The longest chunk of extents; bytes. QEMU's are up to 1 MiB, others' 8 MiB. */
const MOST_STATUS = 2 ** 25;

export interface StatusRequest {
  length: number;
  reqOne: boolean;
  /** Bytes that parts of the answer are multiples of, but for the last one. */
  minimum: number;
  contexts: ReadonlyMap<number, string>;
  /** Told of bytes that are kept until the reply is complete; may throw. */
  hold(bytes: number): void;
}

/**
 * What may come of a block status that has failed. QEMU (7.2) calls an error the end of the reply, and then
 * answers for its other contexts.
 */
export class LateStatus extends Reply<void> {
  constructor(
    readonly generation: number,
    /** Answers that may follow. */
    public left: number,
  ) {
    super();
  }

  result(): void {}

  override fixedBytes(type: number, length: number): number {
    if (type === CHUNK.BLOCK_STATUS && length >= 12 && length <= MOST_STATUS) return 4;
    throw new BadReply('no answer to a block status that has failed');
  }

  /** To nowhere. */
  override start(_type: number, length: number): Buffer {
    return Buffer.allocUnsafe(length - 4);
  }
}

/** The reply to BLOCK_STATUS: one chunk for each meta context. */
export class StatusReply extends Reply<ContextStatus[]> {
  private readonly raw = new Map<number, Buffer>();

  constructor(private readonly request: StatusRequest) {
    super();
  }

  result(): ContextStatus[] {
    const { contexts } = this.request;
    if (this.raw.size !== contexts.size) throw new BadReply('a block status lacks a context');
    return [...contexts].map(([id, name]) => this.decode(name, this.raw.get(id)!));
  }

  override simple(): Buffer {
    throw new BadReply('a block status is not structured');
  }

  override fixedBytes(type: number, length: number): number {
    if (type !== CHUNK.BLOCK_STATUS) return super.fixedBytes(type, length);
    if (length < 12 || length % 8 !== 4 || length > MOST_STATUS) {
      throw new BadReply(`a block status of ${length} bytes`);
    }
    return 4;
  }

  override start(type: number, length: number, bytes: Uint8Array, at: number): Buffer {
    if (type === CHUNK.NONE) return NOTHING;
    const id = decodeUint32(bytes, at);
    if (!this.request.contexts.has(id)) throw new BadReply('a block status of an unknown context');
    if (this.raw.has(id)) throw new BadReply('a block status has a context twice');
    this.heldBytes += length;
    this.request.hold(length);
    // A buffer of its own, and so at an offset that a Uint32Array can have.
    const target = Buffer.allocUnsafeSlow(length - 4);
    this.raw.set(id, target);
    return target;
  }

  private decode(context: string, raw: Buffer): ContextStatus {
    const words = hostWords(raw);
    const count = words.length / 2;
    if (this.request.reqOne && count !== 1) throw new BadReply('more than the one extent asked for');
    const lengths = new Uint32Array(count);
    const flags = new Uint32Array(count);
    const most = this.request.length;
    let covered = 0;
    for (let i = 0; i < count; i++) {
      const length = words[2 * i]!;
      if (length === 0) throw new BadReply('an extent of no bytes');
      if (covered >= most) throw new BadReply('extents beyond what was asked');
      lengths[i] = Math.min(length, most - covered);
      flags[i] = words[2 * i + 1]!;
      covered += length;
    }
    const length = Math.min(covered, most);
    if (length < most && length % this.request.minimum !== 0) {
      throw new BadReply('a block status ends within a block');
    }
    return { context, length, lengths, flags };
  }
}

const LITTLE_ENDIAN = new Uint8Array(new Uint32Array([1]).buffer)[0] === 1;

/** Big-endian words as numbers of this machine's, in place. */
function hostWords(raw: Buffer): Uint32Array {
  if (LITTLE_ENDIAN) raw.swap32();
  return new Uint32Array(raw.buffer, raw.byteOffset, raw.length / 4);
}
