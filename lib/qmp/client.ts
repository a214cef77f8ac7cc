/** One QMP connection: greeting, negotiation, commands, events. */
import type { ThickenError} from '../errors.js';
import { toThickenError } from '../errors.js';
import type { CallParameters, QmpCommandName, ReturnOf } from './commands.js';
import { qmpErrors } from './errors.js';
import { DEFAULT_QUEUE, EventHub, type EventFilter, type EventStream } from './events.js';
import { unhurried, watchLimits, type WaitLimits } from './limits.js';
import { readMessage, type QmpEvent, type QmpMessage } from './message.js';
import { MOST_OUTSTANDING, Outstanding, type Late } from './pending.js';
import { Abilities } from './abilities.js';
import { connectSocket, type QmpTransport } from './transport.js';
import { WireError, type JsonObject } from './wire.js';

export type ClientState =
  | 'connecting'
  | 'greeting'
  | 'negotiating'
  | 'ready'
  | 'closing'
  | 'closed'
  | 'lost';

/** What may follow each state; the last two are ends. */
const NEXT: Record<ClientState, readonly ClientState[]> = {
  connecting: ['greeting', 'ready', 'closing', 'lost'],
  greeting: ['negotiating', 'closing', 'lost'],
  negotiating: ['ready', 'closing', 'lost'],
  ready: ['closing', 'lost'],
  closing: ['closed'],
  closed: [],
  lost: [],
};

const CONNECT_MS = 10_000;
const COMMAND_MS = 60_000;

export interface ConnectOptions extends WaitLimits {
  /** For all of connecting, greeting and negotiating; 10 s if absent. */
  timeoutMs?: number | undefined;
  /** For each command that has none of its own; 60 s if absent, since QEMU may wait for storage. */
  commandTimeoutMs?: number | undefined;
}

export interface ExecuteOptions extends WaitLimits {
  /** Ahead of commands that QEMU still works on, if it can do that; else in turn. */
  oob?: boolean | undefined;
  /** Called if the command succeeds after nobody waits for it any more. */
  late?: Late | undefined;
}

/**
 * A client of a QMP monitor. All methods may be called at any time and in any number; every promise
 * settles. Errors: QMP_LOST, QMP_PROTOCOL (the peer sent nonsense, and the connection is given up),
 * QMP_COMMAND (with `command`, `qmpClass`, `desc`), QMP_TIMEOUT, QMP_BUSY (1,024 commands are
 * without an answer), CANCELLED, CLOSED. A rejection that nobody awaits does not end the process.
 */
export class QmpClient implements AsyncDisposable {
  /** Resolves when the connection ends: with the reason, or null where it was closed from here. */
  readonly onLost: Promise<ThickenError | null>;

  private current: ClientState = 'connecting';
  private readonly outstanding = new Outstanding();
  private readonly hub = new EventHub();
  private failure: ThickenError | undefined;
  private capabilities: string[] = [];
  private oob = false;
  private readonly known = new Abilities(this);
  private closing: Promise<void> | undefined;
  private tellLost!: (error: ThickenError | null) => void;
  private tellGreeted: (() => void) | undefined;
  private failGreeting: ((error: ThickenError) => void) | undefined;

  private constructor(
    private readonly transport: QmpTransport,
    private readonly commandTimeoutMs: number,
  ) {
    this.onLost = new Promise((resolve) => (this.tellLost = resolve));
  }

  /**
   * Connects to an address (see parseAddress) or by a transport, which is closed with the client,
   * also where this fails. Throws also MONITOR_BUSY, USAGE, and the errno's name of a failed connect.
   */
  static async connect(
    where: string | QmpTransport,
    options: ConnectOptions = {},
  ): Promise<QmpClient> {
    const { signal, timeoutMs = CONNECT_MS, commandTimeoutMs = COMMAND_MS } = options;
    const end = performance.now() + timeoutMs;
    const transport =
      typeof where === 'string' ? await connectSocket(where, { signal, timeoutMs }) : where;
    const client = new QmpClient(transport, commandTimeoutMs);
    try {
      await client.open(end, timeoutMs, signal);
      return client;
    } catch (error) {
      await client.close();
      throw error;
    }
  }

  get state(): ClientState {
    return this.current;
  }

  /** The monitor's address. */
  get name(): string {
    return this.transport.name;
  }

  /** Whether events come by themselves; if not, ask by queries. */
  get hasEvents(): boolean {
    return this.transport.events;
  }

  /** The process that serves the monitor, where that can be told (see QmpTransport). */
  peerPid(): number | null {
    return this.transport.peerPid();
  }

  private move(next: ClientState): void {
    if (!NEXT[this.current].includes(next)) throw new Error(`from ${this.current} to ${next}`);
    this.current = next;
  }

  private async open(end: number, timeoutMs: number, signal?: AbortSignal): Promise<void> {
    const left = () => Math.max(1, end - performance.now());
    if (this.transport.handshake) {
      this.move('greeting');
      const greeted = this.greeted({ timeoutMs: left(), signal }, timeoutMs);
      this.start();
      await greeted;
      await this.negotiate({ timeoutMs: left(), signal });
    } else {
      this.start();
      if (signal?.aborted) throw qmpErrors.cancelled(this.name, 'connect', signal.reason);
    }
    // A peer that went in this very moment has ended the client already.
    if (this.failure) throw this.failure;
    this.move('ready');
  }

  private start(): void {
    this.transport.start({
      message: (value, bytes) => this.take(value, bytes),
      ended: (error) => this.lose(error),
    });
  }

  private greeted(limits: WaitLimits, timeoutMs: number): Promise<void> {
    const greeted = new Promise<void>((resolve, reject) => {
      this.tellGreeted = resolve;
      this.failGreeting = reject;
    });
    const stop = watchLimits(limits, (error) => this.failGreeting?.(error), {
      timeout: () => qmpErrors.busy(this.name, timeoutMs),
      cancelled: (reason) => qmpErrors.cancelled(this.name, 'connect', reason),
    });
    return unhurried(greeted.finally(stop));
  }

  private async negotiate(limits: WaitLimits): Promise<void> {
    const oob = this.capabilities.includes('oob');
    await this.ask('qmp_capabilities', oob ? { enable: ['oob'] } : undefined, limits);
    this.oob = oob;
  }

  /** Sends a command; see the class for what it rejects with. What was sent may be carried out. */
  execute<C extends QmpCommandName>(
    command: C,
    ...[args, options]: CallParameters<C, ExecuteOptions>
  ): Promise<ReturnOf<C>> {
    return this.executeAny(command, args, options);
  }

  /** The same for a command that QmpCommands does not list. */
  executeAny(command: string, args?: object, options: ExecuteOptions = {}): Promise<unknown> {
    if (this.current === 'ready') return this.ask(command, args, options);
    return unhurried(Promise.reject(this.refusal()));
  }

  private refusal(): ThickenError {
    if (this.failure) return this.failure;
    const closed = this.current === 'closing' || this.current === 'closed';
    return closed ? qmpErrors.closed(this.name) : qmpErrors.notReady(this.name, this.current);
  }

  private ask(command: string, args: object | undefined, options: ExecuteOptions): Promise<unknown> {
    return unhurried(
      new Promise((resolve, reject) => {
        // A peer can greet and break the protocol in one breath, before the greeting is acted on.
        if (this.ending) throw this.refusal();
        if (this.outstanding.full) throw qmpErrors.tooMany(this.name, MOST_OUTSTANDING);
        const { signal, timeoutMs = this.commandTimeoutMs } = options;
        if (signal?.aborted) throw qmpErrors.cancelled(this.name, command, signal.reason);
        const verb = options.oob && this.oob ? 'exec-oob' : 'execute';
        // Before an id is taken: what can't be put into JSON throws here.
        const body = JSON.stringify({ [verb]: command, ...(args && { arguments: args }) });
        const id = this.outstanding.add({ command, answered: settle(resolve), failed: settle(reject) });
        const abandon = (error: ThickenError) => {
          this.outstanding.abandon(id, options.late);
          reject(error);
        };
        const stop = watchLimits({ signal, timeoutMs }, abandon, {
          timeout: () => qmpErrors.timeout(this.name, command, timeoutMs),
          cancelled: (reason) => qmpErrors.cancelled(this.name, command, reason),
        });
        function settle<T>(settled: (value: T) => void): (value: T) => void {
          return (value) => {
            stop();
            settled(value);
          };
        }
        this.send(`${body.slice(0, -1)},"id":${id}}`);
      }),
    );
  }

  private send(text: string): void {
    this.transport.send(text).catch((error: unknown) => this.lose(toThickenError(error)));
  }

  private take(value: JsonObject, bytes: number): void {
    if (this.ending) return;
    try {
      this.handle(readMessage(value, bytes));
    } catch (error) {
      if (error instanceof WireError) this.lose(qmpErrors.protocol(this.name, error.message));
      else this.lose(toThickenError(error));
    }
  }

  private get ending(): boolean {
    return this.current === 'closing' || this.current === 'closed' || this.current === 'lost';
  }

  private handle(message: QmpMessage): void {
    if (message.kind === 'greeting') return this.greet(message.capabilities);
    if (this.current === 'greeting') throw new WireError('a message before the greeting');
    if (message.kind === 'event') return this.hub.publish(message.event);
    const whose = this.outstanding.take(message.id);
    if (!whose) throw new WireError(`a reply to a command ${message.id} that was not sent, or was answered`);
    if ('late' in whose) {
      if (message.kind === 'return') whose.late?.(message.value);
    } else if (message.kind === 'return') whose.answered(message.value);
    else {
      const { qmpClass, desc } = message;
      whose.failed(qmpErrors.command(this.name, whose.command, qmpClass, desc));
    }
  }

  private greet(capabilities: string[]): void {
    if (this.current !== 'greeting') throw new WireError('a greeting where none is due');
    this.capabilities = capabilities;
    this.move('negotiating');
    this.tellGreeted?.();
  }

  private lose(error: ThickenError): void {
    if (this.ending) return;
    this.failure = error;
    this.move('lost');
    this.settleAll(error, error);
    void this.transport.close().catch(() => undefined);
  }

  private settleAll(error: ThickenError, reason: ThickenError | null): void {
    this.failGreeting?.(error);
    this.outstanding.failAll(error);
    this.hub.end(reason);
    this.tellLost(reason);
  }

  /**
   * Events that match `filter` (names, or a predicate) from now on; see EventStream. At most
   * `limit` (256) are kept for a slow reader. Without `hasEvents` none will come.
   */
  events(filter: EventFilter, { limit = DEFAULT_QUEUE }: { limit?: number } = {}): EventStream {
    return this.hub.stream(filter, limit);
  }

  /** Calls `listener` with each event, as it comes; it must not throw. Returns what ends that. */
  listen(listener: (event: QmpEvent) => void): () => void {
    return this.hub.subscribe({ offer: listener, end: () => undefined });
  }

  /** The first event that matches from now on. Throws UNSUPPORTED where events don't come. */
  waitFor(filter: EventFilter, limits: WaitLimits = {}): Promise<QmpEvent> {
    if (!this.hasEvents) return unhurried(Promise.reject(qmpErrors.noEvents(this.name)));
    return this.hub.waitFor(filter, limits, {
      timeout: () => qmpErrors.timeout(this.name, 'an event', limits.timeoutMs ?? 0),
      cancelled: (reason) => qmpErrors.cancelled(this.name, 'waiting for an event', reason),
      closed: () => qmpErrors.closed(this.name),
    });
  }

  /** Whether this QEMU has the command, by its own list. */
  supports(command: string): Promise<boolean> {
    return unhurried(this.known.commands().then((names) => names.has(command)));
  }

  /**
   * Whether the command takes the argument at `path` (members, joined by dots; those of any variant
   * of a union count), and, if a `value` is given, whether it knows that word. Under a busy guest
   * better not: the description keeps QEMU's main loop, and so the guest's disks, waiting for some
   * 60 ms (7.2).
   */
  supportsArgument(command: string, path: string, value?: string): Promise<boolean> {
    return unhurried(
      this.known.schema().then((schema) => schema.hasArgument(command, path, value)),
    );
  }

  /** Rejects what waits (CLOSED), and resolves when the connection is gone. Idempotent. */
  close(): Promise<void> {
    this.closing ??= this.shut();
    return this.closing;
  }

  private async shut(): Promise<void> {
    if (!this.ending) {
      this.move('closing');
      this.settleAll(qmpErrors.closed(this.name), null);
    }
    await this.transport.close();
    if (this.current === 'closing') this.move('closed');
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}
