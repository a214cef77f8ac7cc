/** A client of one export of an NBD server. */
import { Connection, type Command, type Limits } from './connection.js';
import { nbdErrors } from './errors.js';
import { dial, type DialOptions, type NbdAddress } from './dial.js';
import type { Negotiated } from './handshake.js';
import {
  COMMAND_FLAG,
  MOST_LENGTH,
  MOST_STRING,
  type BlockSize,
  type CommandName,
  type ExportFlags,
} from './protocol.js';
import { PlainReply, ReadReply, StatusReply, type ContextStatus } from './replies.js';

export type { ContextStatus } from './replies.js';
export type { BlockSize, ExportFlags } from './protocol.js';
export type { NbdAddress, DialOptions } from './dial.js';
export type { TlsOptions } from './transport.js';

export const BASE_ALLOCATION = 'base:allocation';
export const ALLOCATION_DEPTH = 'qemu:allocation-depth';

export interface ConnectOptions extends DialOptions {
  /** Meta contexts to ask for; `contexts` tells which the server has. None by default. */
  metaContexts?: readonly string[];
  /** Requests that the server has at a time; the others wait. 16 by default. */
  maxInFlight?: number;
  /** Bytes of READ and WRITE under way at a time; 64 MiB by default. */
  maxBytesInFlight?: number;
  /** Milliseconds in which each request must be answered, once sent; 0: no limit. 2 min by default. */
  requestTimeoutMs?: number;
}

export interface RequestOptions {
  /**
   * Rejects the request with CANCELLED. One that the server has may still be carried out; its
   * answer is dropped when it comes, and until then it counts as in flight.
   */
  signal?: AbortSignal | undefined;
}

export interface StatusOptions extends RequestOptions {
  /** One extent only, which is cheaper for the server. */
  reqOne?: boolean;
}

export interface WriteOptions extends RequestOptions {
  /** Durable before it is answered. */
  fua?: boolean;
}

export interface WriteZeroesOptions extends WriteOptions {
  /** Storage stays or becomes allocated. */
  noHole?: boolean;
  /** Fail with ENOTSUP where it would be no faster than writing. */
  fast?: boolean;
}

const MOST_CONTEXTS = 32;

const DEFAULT_LIMITS: Limits = {
  maxInFlight: 16,
  maxBytesInFlight: 2 ** 26,
  requestTimeoutMs: 120_000,
};
/** The least and the most that each may be; a timer takes no more than 2^31-1 ms. */
const BOUNDS: Record<keyof Limits, [least: number, most: number]> = {
  maxInFlight: [1, 1024],
  maxBytesInFlight: [1, Number.MAX_SAFE_INTEGER],
  requestTimeoutMs: [0, 2 ** 31 - 1],
};

/**
 * All offsets and lengths are bytes, and multiples of `blockSize.minimum` (but for a length that
 * ends at the export's end); what is not, or lies outside of the export, is RANGE. Requests go out
 * in the order of the calls and are answered in any. Errors that the server answers have the errno's
 * name as code (EIO, ENOSPC, …) and concern that request alone. NBD_LOST, NBD_PROTOCOL and
 * NBD_TIMEOUT end the connection, and reject all that is under way.
 */
export class NbdClient implements AsyncDisposable {
  private constructor(
    private readonly connection: Connection,
    private readonly facts: Negotiated,
    /** The server's address, as errors name it. */
    readonly path: string,
  ) {}

  /**
   * Connects to an address, a `nbd://` URI, or over a stream that is connected already, and is then
   * the client's to end, also where this fails.
   * Throws NBD_LOST, NBD_PROTOCOL, NBD_REFUSED, NBD_TLS, NBD_TIMEOUT, CANCELLED, USAGE, and RANGE
   * for an export of more than 2^53-1 bytes.
   */
  static async connect(
    address: NbdAddress | string,
    options: ConnectOptions = {},
  ): Promise<NbdClient> {
    const limits = limitsOf(options);
    const contexts = contextsOf(options);
    return dial(address, options, async (handshake, transport, exportName) => {
      const structured = await handshake.askStructured();
      const chosen =
        structured && contexts.length > 0
          ? await handshake.setContexts(exportName, contexts)
          : new Map<number, string>();
      const facts = { ...(await handshake.go(exportName)), structured, contexts: chosen };
      const connection = new Connection(transport, structured, limits);
      const rest = handshake.rest();
      if (rest.length > 0) connection.receive(rest);
      return new NbdClient(connection, facts, transport.path);
    });
  }

  /** The exports that the server is willing to list; names and words as it sends them, unsanitised. */
  static list(
    address: NbdAddress | string,
    options: DialOptions = {},
  ): Promise<{ name: string; description: string }[]> {
    return dial(address, options, async (handshake) => {
      const exports = await handshake.listExports();
      handshake.abort();
      return exports;
    }, true);
  }

  /** Names of the meta contexts that an export has. */
  static listMetaContexts(
    address: NbdAddress | string,
    options: DialOptions & { queries?: readonly string[] } = {},
  ): Promise<string[]> {
    return dial(address, options, async (handshake, _transport, exportName) => {
      const structured = await handshake.askStructured();
      const names = structured ? await handshake.listContexts(exportName, options.queries ?? []) : [];
      handshake.abort();
      return names;
    }, true);
  }

  /** Bytes. */
  get size(): number {
    return this.facts.size;
  }

  get flags(): Readonly<ExportFlags> {
    return this.facts.flags;
  }

  get blockSize(): Readonly<BlockSize> {
    return this.facts.blockSize;
  }

  /** The meta contexts that `blockStatus` tells of, in its order. */
  get contexts(): string[] {
    return [...this.facts.contexts.values()];
  }

  /** As the server has it, unsanitised. */
  get exportName(): string {
    return this.facts.exportName;
  }

  /** The server's words for people, unsanitised. */
  get description(): string | null {
    return this.facts.description;
  }

  /**
   * What each context says of the extents from `offset` on. An answer may cover less than `length`
   * (up to 2^32-1), and differently much in each context, but never nothing.
   */
  blockStatus(offset: number, length: number, options: StatusOptions = {}): Promise<ContextStatus[]> {
    if (this.facts.contexts.size === 0) return this.refuse('meta contexts, or none was chosen');
    const { connection } = this;
    const reply = new StatusReply({
      length,
      reqOne: options.reqOne ?? false,
      minimum: this.blockSize.minimum,
      contexts: this.facts.contexts,
      hold: (bytes) => connection.hold(bytes),
    });
    const flags = options.reqOne ? COMMAND_FLAG.REQ_ONE : 0;
    const answers = this.facts.contexts.size;
    return this.run({ name: 'BLOCK_STATUS', offset, length, flags, reply, answers, bytes: 0 }, options);
  }

  /** Has the server read ahead; QEMU copies from the backing chain where its node does that. */
  cache(offset: number, length: number, options: RequestOptions = {}): Promise<void> {
    if (!this.flags.cache) return this.refuse('CACHE');
    return this.run(plain('CACHE', offset, length), options);
  }

  read(offset: number, length: number, options: RequestOptions = {}): Promise<Buffer> {
    const reply = new ReadReply(offset, length, this.facts.structured);
    return this.run({ name: 'READ', offset, length, flags: 0, reply, bytes: length }, options);
  }

  /** `data` must not change before this settles. */
  write(offset: number, data: Uint8Array, options: WriteOptions = {}): Promise<void> {
    const payload = Buffer.from(data.buffer, data.byteOffset, data.byteLength);
    const command = plain('WRITE', offset, payload.length, this.fua(options));
    return this.modify({ ...command, payload, bytes: payload.length }, options);
  }

  /** Up to 2^32-1 bytes. */
  writeZeroes(offset: number, length: number, options: WriteZeroesOptions = {}): Promise<void> {
    // What is read-only offers none of it, and is refused as such below.
    if (!this.flags.readOnly && !this.flags.writeZeroes) return this.refuse('WRITE_ZEROES');
    if (options.fast && !this.flags.fastZero) return this.refuse('fast WRITE_ZEROES');
    const flags =
      this.fua(options) |
      (options.noHole ? COMMAND_FLAG.NO_HOLE : 0) |
      (options.fast ? COMMAND_FLAG.FAST_ZERO : 0);
    return this.modify(plain('WRITE_ZEROES', offset, length, flags), options);
  }

  /** All that was answered before is durable when this resolves. */
  flush(options: RequestOptions = {}): Promise<void> {
    if (!this.flags.flush) return this.refuse('FLUSH');
    return this.connection.run({ ...plain('FLUSH', 0, 0), signal: options.signal });
  }

  /** Waits for all requests, then says goodbye. Never rejects; safe to call again. */
  disconnect(): Promise<void> {
    return this.connection.disconnect();
  }

  /** Closes at once: what is under way is rejected with CLOSED. */
  destroy(): void {
    this.connection.destroy(nbdErrors.closed(this.path));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.disconnect();
  }

  private fua({ fua }: WriteOptions): number {
    return fua ? COMMAND_FLAG.FUA : 0;
  }

  private modify(command: Omit<Command<void>, 'signal'>, options: WriteOptions): Promise<void> {
    if (this.flags.readOnly) return this.refuse('writing', 'EPERM');
    if (options.fua && !this.flags.fua) return this.refuse('FUA');
    return this.run(command, options);
  }

  private run<T>(command: Omit<Command<T>, 'signal'>, { signal }: RequestOptions): Promise<T> {
    const error = this.check(command);
    return error ? Promise.reject(error) : this.connection.run({ ...command, signal });
  }

  private refuse(what: string, code?: 'ENOTSUP' | 'EPERM'): Promise<never> {
    return Promise.reject(nbdErrors.notOffered(this.path, what, code));
  }

  private check(range: { name: CommandName; offset: number; length: number }): Error | undefined {
    const { name, offset, length } = range;
    const { minimum } = this.blockSize;
    const whole = Number.isSafeInteger(offset) && Number.isSafeInteger(length);
    if (!whole || offset < 0 || length < 1 || offset + length > this.size) {
      return this.rangeError(name, `lies outside of the ${this.size} bytes`, 'ask for a part of them', range);
    }
    const atEnd = offset + length === this.size;
    if (offset % minimum !== 0 || (length % minimum !== 0 && !atEnd)) {
      return this.rangeError(name, `is not in blocks of ${minimum} bytes`, 'widen the range', range);
    }
    const most = this.longest(name);
    if (length <= most) return undefined;
    return this.rangeError(name, `is longer than ${most} bytes`, 'split it', range);
  }

  private longest(name: CommandName): number {
    return name === 'BLOCK_STATUS' || name === 'WRITE_ZEROES' ? MOST_LENGTH : this.blockSize.maximum;
  }

  private rangeError(
    name: CommandName,
    what: string,
    remedy: string,
    { offset, length }: { offset: number; length: number },
  ): Error {
    const text = `${name} of ${length} bytes at ${offset} ${what}`;
    return nbdErrors.range(text, remedy, { path: this.path });
  }
}

function plain(name: CommandName, offset: number, length: number, flags = 0) {
  return { name, offset, length, flags, bytes: 0, reply: new PlainReply() };
}

function contextsOf({ metaContexts = [] }: ConnectOptions): string[] {
  const names = [...new Set(metaContexts)];
  const fits = (name: string) => name !== '' && Buffer.byteLength(name) <= MOST_STRING;
  if (names.length <= MOST_CONTEXTS && names.every(fits)) return names;
  throw nbdErrors.option('metaContexts has a name that is none, or too many', 'give a few names');
}

function limitsOf(options: ConnectOptions): Limits {
  const limits = { ...DEFAULT_LIMITS };
  for (const key of Object.keys(limits) as (keyof Limits)[]) {
    const value = options[key] ?? limits[key];
    const [least, most] = BOUNDS[key];
    if (!Number.isSafeInteger(value) || value < least || value > most) {
      throw nbdErrors.option(`${key} is ${value}`, `give a whole number from ${least} to ${most}`);
    }
    limits[key] = value;
  }
  return limits;
}
