/** The second phase of a connection: requests in flight, found again by their cookies. */
import { ThickenError, toThickenError } from '../errors.js';
import { AbortGroups } from './abort-groups.js';
import { nbdErrors } from './errors.js';
import { COMMAND, encodeRequest, REQUEST_BYTES, type CommandName } from './protocol.js';
import { Queue, Queued } from './queue.js';
import { BadReply, LateStatus, type Reply } from './replies.js';
import { ReplyParser } from './reply-parser.js';
import type { Transport } from './transport.js';

export interface Limits {
  /** Requests that the server has at a time. */
  maxInFlight: number;
  /** Bytes of READ and WRITE that are under way at a time; a larger request goes alone. */
  maxBytesInFlight: number;
  /** Milliseconds for an answer; 0: no limit. */
  requestTimeoutMs: number;
}

export interface Command<T> {
  name: CommandName;
  flags: number;
  offset: number;
  length: number;
  payload?: Buffer;
  /** Bytes of READ and WRITE that it moves. */
  bytes: number;
  reply: Reply<T>;
  /** Contexts of a block status, each of which may be answered by itself. */
  answers?: number;
  signal: AbortSignal | undefined;
}

class Request extends Queued {
  /** The promise has been settled; the reply may still be to come. */
  settled = false;
  /** The payload is still being read from the caller's buffer. */
  sending = false;
  generation = 0;
  /** The clock's tick at which it was sent. */
  tick = 0;

  constructor(
    readonly command: Command<unknown>,
    readonly resolve: (value: unknown) => void,
    readonly reject: (error: Error) => void,
  ) {
    super();
  }

  get range(): { offset: number; length: number } {
    const { offset, length } = this.command;
    return { offset, length };
  }
}

/** An answer is too late after this many ticks: a process that was stopped must not count the time. */
const TICKS = 8;
/** Bytes of incomplete block statuses; complete ones are their callers'. */
const MOST_HELD = 2 ** 26;
const CLOSE_MS = 2_000;

export class Connection {
  private readonly waiting = new Queue<Request>();
  private readonly aborts = new AbortGroups<Request>((request) => this.abort(request));
  private readonly slots: (Request | undefined)[] = [];
  private readonly freeSlots: number[] = [];
  /** Of the last block status in a slot, where that failed. */
  private readonly late = new Map<number, LateStatus>();
  private readonly parser: ReplyParser;
  private inFlight = 0;
  private bytesInFlight = 0;
  private heldBytes = 0;
  private generation = 0;
  private tick = 0;
  private readonly clock: NodeJS.Timeout | undefined;
  private ending: Promise<void> | undefined;
  private idle: (() => void) | undefined;
  private lost: ThickenError | undefined;

  constructor(
    private readonly transport: Transport,
    structured: boolean,
    private readonly limits: Limits,
  ) {
    const table = {
      find: (generation: number, slot: number) => this.find(generation, slot),
      done: (slot: number, reply: Reply<unknown>) => this.done(slot, reply),
    };
    this.parser = new ReplyParser(table, structured);
    transport.handlers = {
      data: (chunk) => this.receive(chunk),
      lost: (error) => this.lose(error),
      drain: () => this.pump(),
    };
    if (limits.requestTimeoutMs > 0) {
      const ms = Math.max(1, limits.requestTimeoutMs / TICKS);
      this.clock = setInterval(() => this.checkTime(), ms).unref();
    }
    if (transport.lost) this.lose(transport.lost);
  }

  /** Bytes that came with the end of the handshake, or later. */
  receive(chunk: Buffer): void {
    try {
      this.parser.add(chunk);
    } catch (error) {
      // Thrown on, it would end the process: nobody stands above a stream's events.
      const bad = error instanceof BadReply;
      const { path } = this.transport;
      this.transport.fail(bad ? nbdErrors.protocol(path, error.message) : toThickenError(error));
    }
  }

  /** A reply's bytes that are not given out yet. */
  hold(bytes: number): void {
    this.heldBytes += bytes;
    if (this.heldBytes > MOST_HELD) throw new BadReply('too many block statuses are left unfinished');
  }

  /** Sends a command in its turn. Rejects with CANCELLED as soon as its signal aborts. */
  run<T>(command: Command<T>): Promise<T> {
    const refusal = this.refusal(command);
    if (refusal) return Promise.reject(refusal);
    return new Promise<unknown>((resolve, reject) => {
      const request = new Request(command, resolve, reject);
      this.waiting.push(request);
      if (command.signal) this.aborts.join(command.signal, request);
      this.pump();
    }) as Promise<T>;
  }

  /** Waits for all that was asked, says goodbye, and closes. Never rejects; safe to call again. */
  disconnect(): Promise<void> {
    this.ending ??= this.end();
    return this.ending;
  }

  /** Closes at once; what waits is rejected. */
  destroy(error: ThickenError): void {
    this.transport.fail(error);
  }

  private refusal({ signal, offset, length }: Command<unknown>): ThickenError | undefined {
    const { path } = this.transport;
    if (this.ending) return nbdErrors.closed(path);
    if (this.lost) return this.lost;
    return signal?.aborted ? nbdErrors.cancelled(path, { offset, length }) : undefined;
  }

  private abort(request: Request): void {
    // The buffer goes back to the caller only when it is not read any more.
    if (request.sending) return;
    // One that has been sent keeps its slot, and its bytes, until its reply has come.
    this.waiting.remove(request);
    this.settle(request, nbdErrors.cancelled(this.transport.path, request.range));
    this.pump();
  }

  private pump(): void {
    for (let next = this.waiting.first; next; next = this.waiting.first) {
      if (!this.fits(next.command.bytes)) return;
      this.waiting.remove(next);
      this.send(next);
    }
    if (this.inFlight === 0) this.idle?.();
  }

  private fits(bytes: number): boolean {
    if (this.lost || this.transport.blocked) return false;
    if (this.inFlight >= this.limits.maxInFlight) return false;
    if (bytes === 0 || this.bytesInFlight === 0) return true;
    return this.bytesInFlight + bytes <= this.limits.maxBytesInFlight;
  }

  private send(request: Request): void {
    const slot = this.freeSlots.pop() ?? this.slots.length;
    this.slots[slot] = request;
    this.inFlight++;
    this.bytesInFlight += request.command.bytes;
    this.generation = (this.generation + 1) >>> 0;
    request.generation = this.generation;
    request.tick = this.tick;
    const head = Buffer.allocUnsafe(REQUEST_BYTES);
    const { flags, name, offset, length, payload } = request.command;
    encodeRequest(head, flags, COMMAND[name], request.generation, slot, offset, length);
    if (!payload) return this.transport.send(head);
    request.sending = true;
    this.transport.send(head, payload, () => this.sent(request));
  }

  private sent(request: Request): void {
    request.sending = false;
    if (request.command.signal?.aborted) this.abort(request);
  }

  private find(generation: number, slot: number): Reply<unknown> {
    const request = this.slots[slot];
    if (request?.generation === generation) return request.command.reply;
    const late = this.late.get(slot);
    if (late?.generation === generation && late.left-- > 0) return late;
    throw new BadReply('a reply to no request');
  }

  private done(slot: number, reply: Reply<unknown>): void {
    if (reply instanceof LateStatus) return;
    const request = this.slots[slot]!;
    const { answers = 1 } = request.command;
    if (reply.error && answers > 1) this.late.set(slot, new LateStatus(request.generation, answers - 1));
    // Judged before the slot is free: a bad reply loses the connection, and with it the request.
    const outcome = this.outcome(request);
    this.slots[slot] = undefined;
    this.freeSlots.push(slot);
    this.inFlight--;
    this.bytesInFlight -= request.command.bytes;
    this.heldBytes -= request.command.reply.heldBytes;
    this.settle(request, outcome);
    this.pump();
  }

  private outcome({ command, settled, range }: Request): unknown {
    const { reply, name } = command;
    const { error } = reply;
    // Nobody looks at a cancelled one's.
    if (settled) return undefined;
    if (!error) return reply.result();
    const details = { path: this.transport.path, ...range };
    return nbdErrors.command(error.errno, name, error.message, details);
  }

  /** A ThickenError rejects; no reply's result is one. */
  private settle(request: Request, outcome: unknown): void {
    if (request.settled) return;
    request.settled = true;
    const { signal } = request.command;
    if (signal) this.aborts.leave(signal, request);
    if (outcome instanceof ThickenError) request.reject(outcome);
    else request.resolve(outcome);
  }

  private lose(error: ThickenError): void {
    this.lost = error;
    clearInterval(this.clock);
    for (const request of this.slots.splice(0)) if (request) this.settle(request, error);
    for (let next = this.waiting.first; next; next = this.waiting.first) {
      this.waiting.remove(next);
      this.settle(next, error);
    }
    this.idle?.();
  }

  private checkTime(): void {
    this.tick++;
    const late = this.slots.find((request) => request && this.tick - request.tick > TICKS);
    if (!late) return;
    const what = `${late.command.name} got no answer within ${this.limits.requestTimeoutMs} ms`;
    this.transport.fail(nbdErrors.timeout(this.transport.path, what, late.range));
  }

  private async end(): Promise<void> {
    // A client must not send DISC before all its replies have come (NBD protocol).
    if (!this.lost && (this.inFlight > 0 || this.waiting.first)) {
      await new Promise<void>((resolve) => (this.idle = resolve));
    }
    const closed = nbdErrors.closed(this.transport.path);
    if (!this.lost) {
      const head = Buffer.allocUnsafe(REQUEST_BYTES);
      encodeRequest(head, 0, COMMAND.DISC, 0, 0, 0, 0);
      this.transport.send(head);
    }
    await this.transport.end(closed, CLOSE_MS);
  }
}
