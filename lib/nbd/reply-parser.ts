/** Replies out of a stream of bytes, wherever it is cut into pieces. */
import {
  CHUNK,
  CHUNK_DONE,
  CHUNK_ERROR_BIT,
  decodeErrorChunk,
  decodeUint16,
  decodeUint32,
  SIMPLE_BYTES,
  SIMPLE_MAGIC,
  STRUCTURED_BYTES,
  STRUCTURED_MAGIC,
} from './protocol.js';
import { BadReply, checkErrorLength, type Reply } from './replies.js';

/** Whose replies they are. */
export interface ReplyTable {
  /** Throws BadReply where no such request waits. */
  find(generation: number, slot: number): Reply<unknown>;
  /** The reply, as it was found, is complete. */
  done(slot: number, reply: Reply<unknown>): void;
}

/** What the fixed bytes that are being collected are. */
type Phase = 'magic' | 'simple' | 'structured' | 'fixed' | 'error';

/** Fixed parts are at most an error chunk. */
const SCRATCH_BYTES = 8192;

export class ReplyParser {
  private phase: Phase = 'magic';
  /** Bytes of the phase, and what came of them so far where they came in pieces. */
  private needed = 4;
  private readonly scratch = Buffer.alloc(SCRATCH_BYTES);
  private collected = 0;

  private body: Buffer | undefined;
  private bodyAt = 0;

  private reply: Reply<unknown> | undefined;
  private slot = 0;
  private type = 0;
  private length = 0;
  private last = false;

  constructor(
    private readonly table: ReplyTable,
    private readonly structured: boolean,
  ) {}

  /** Throws BadReply where the bytes make no sense; the parser is then of no further use. */
  add(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length) at = this.body ? this.fillBody(chunk, at) : this.fillFixed(chunk, at);
  }

  private fillFixed(chunk: Buffer, at: number): number {
    const lacking = this.needed - this.collected;
    if (this.collected === 0 && chunk.length - at >= lacking) {
      this.take(chunk, at);
      return at + lacking;
    }
    const taken = Math.min(lacking, chunk.length - at);
    chunk.copy(this.scratch, this.collected, at, at + taken);
    this.collected += taken;
    if (taken === lacking) {
      this.collected = 0;
      this.take(this.scratch, 0);
    }
    return at + taken;
  }

  private fillBody(chunk: Buffer, at: number): number {
    const body = this.body!;
    const taken = Math.min(body.length - this.bodyAt, chunk.length - at);
    chunk.copy(body, this.bodyAt, at, at + taken);
    this.bodyAt += taken;
    if (this.bodyAt === body.length) this.endChunk();
    return at + taken;
  }

  private take(bytes: Buffer, at: number): void {
    switch (this.phase) {
      case 'magic':
        return this.magic(bytes, at);
      case 'simple':
        return this.simpleHead(bytes, at);
      case 'structured':
        return this.structuredHead(bytes, at);
      case 'fixed':
        return this.begin(this.reply!.start(this.type, this.length, bytes, at));
      case 'error':
        return this.error(bytes.subarray(at, at + this.length));
    }
  }

  private expect(bytes: number, phase: Phase): void {
    this.needed = bytes;
    this.phase = phase;
  }

  /** The head's length depends on its first four bytes. */
  private magic(bytes: Buffer, at: number): void {
    const magic = decodeUint32(bytes, at);
    if (magic === STRUCTURED_MAGIC && this.structured) {
      this.expect(STRUCTURED_BYTES - 4, 'structured');
    } else if (magic === SIMPLE_MAGIC) {
      this.expect(SIMPLE_BYTES - 4, 'simple');
    } else {
      throw new BadReply('the magic number of a reply is wrong');
    }
  }

  private simpleHead(bytes: Buffer, at: number): void {
    const errno = decodeUint32(bytes, at);
    this.find(bytes, at + 4);
    this.last = true;
    this.type = CHUNK.NONE;
    if (errno === 0) return this.begin(this.reply!.simple());
    this.reply!.addError(errno, '', undefined);
    this.endChunk();
  }

  private structuredHead(bytes: Buffer, at: number): void {
    this.last = (decodeUint16(bytes, at) & CHUNK_DONE) !== 0;
    this.type = decodeUint16(bytes, at + 2);
    this.find(bytes, at + 4);
    this.length = decodeUint32(bytes, at + 12);
    if (this.type & CHUNK_ERROR_BIT) {
      checkErrorLength(this.length);
      return this.expect(this.length, 'error');
    }
    if (this.type === CHUNK.NONE && !this.last) throw new BadReply('an empty chunk that is not the last');
    const fixed = this.reply!.fixedBytes(this.type, this.length);
    if (fixed === 0) this.endChunk();
    else this.expect(fixed, 'fixed');
  }

  private find(bytes: Buffer, at: number): void {
    this.slot = decodeUint32(bytes, at + 4);
    this.reply = this.table.find(decodeUint32(bytes, at), this.slot);
  }

  private error(payload: Buffer): void {
    // Of an unknown type of error only the number and the message have known places.
    const known = this.type === CHUNK.ERROR || this.type === CHUNK.ERROR_OFFSET;
    const end = known ? payload.length : 6 + decodeUint16(payload, 4);
    const error = decodeErrorChunk(payload.subarray(0, end), this.type === CHUNK.ERROR_OFFSET);
    if (!error) throw new BadReply('an error chunk is malformed');
    this.reply!.addError(error.errno, error.message, error.offset);
    this.endChunk();
  }

  private begin(body: Buffer): void {
    if (body.length === 0) return this.endChunk();
    this.body = body;
    this.bodyAt = 0;
  }

  private endChunk(): void {
    const reply = this.reply!;
    this.body = undefined;
    this.reply = undefined;
    this.expect(4, 'magic');
    if (this.last) this.table.done(this.slot, reply);
  }
}
