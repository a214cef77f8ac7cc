/** How QMP messages travel: the seam, and sockets behind it. */
import { connect, type NetConnectOpts, type Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import { ThickenError } from '../errors.js';
import { native } from '../native.js';
import { qmpErrors } from './errors.js';
import { unhurried, watchLimits, type WaitLimits } from './limits.js';
import { ObjectDecoder, WireError, type JsonObject } from './wire.js';

/** Who a transport tells what comes. Neither method throws. */
export interface QmpReceiver {
  /** One whole message; `bytes` is its size on the wire. */
  message(value: JsonObject, bytes: number): void;
  /** Once, after the last message: why no more can come. */
  ended(error: ThickenError): void;
}

/**
 * Carries whole messages both ways. Where commands are relayed by somebody who owns the monitor,
 * there is no greeting (`handshake`), and events do not come (`events`): whoever uses a transport
 * must do with queries alone.
 */
export interface QmpTransport {
  /** The address, for messages. */
  readonly name: string;
  /** Whether events come by themselves. */
  readonly events: boolean;
  /** Whether the peer greets, and wants its capabilities negotiated. */
  readonly handshake: boolean;
  /** Once, before anything is sent. What has come before is told then. */
  start(receiver: QmpReceiver): void;
  /** One command as JSON text, without a line end. Where this rejects, the connection is given up. */
  send(text: string): Promise<void>;
  /** Idempotent; what was sent before is still delivered if the peer takes it. `ended` is not called. */
  close(): Promise<void>;
  /**
   * The process at the other end of a UNIX socket, by SO_PEERCRED: who called listen(2), in this
   * process's namespace. null where that can't be told.
   */
  peerPid(): number | null;
}

export type QmpAddress = { kind: 'unix'; path: string } | { kind: 'tcp'; host: string; port: number };

const CONNECT_MS = 10_000;
const RETRY_MS = 50;
/** What a peer that does not read gets of what was sent last. */
const LINGER_MS = 1000;
const KEEP_ALIVE_MS = 30_000;
/** Bytes of sun_path (unix(7)), the last of them a NUL; Node cuts longer names silently. */
const MOST_PATH_BYTES = 107;

/** `unix:PATH`, `tcp:HOST:PORT`, a path with a slash, or `HOST:PORT`. Throws USAGE. */
export function parseAddress(text: string): QmpAddress {
  const path = /^unix:(.+)$/s.exec(text)?.[1] ?? (/^[^:]*\//.test(text) ? text : undefined);
  if (path !== undefined) return unixAddress(path, text);
  const [, bracketed, plain, digits] =
    /^(?:tcp:)?(?:\[([^\]\s]+)\]|([^:\s[\]]+)):(\d{1,5})$/.exec(text) ?? [];
  const host = bracketed ?? plain;
  const port = Number(digits);
  if (host === undefined || !(port >= 1 && port <= 65_535)) throw qmpErrors.badAddress(text);
  return { kind: 'tcp', host, port };
}

function unixAddress(path: string, text: string): QmpAddress {
  if (path.includes('\0') || Buffer.byteLength(path) > MOST_PATH_BYTES) throw qmpErrors.badAddress(text);
  return { kind: 'unix', path };
}

/**
 * Connects to a QMP socket; says nothing yet. Throws USAGE for a bad address, the errno's name,
 * MONITOR_BUSY where the socket's queue of clients stays full, QMP_TIMEOUT, CANCELLED.
 */
export async function connectSocket(address: string, limits: WaitLimits = {}): Promise<QmpTransport> {
  const where = parseAddress(address);
  const timeoutMs = limits.timeoutMs ?? CONNECT_MS;
  const end = performance.now() + timeoutMs;
  for (;;) {
    try {
      const left = Math.max(1, end - performance.now());
      return new SocketTransport(address, await openSocket(where, address, { ...limits, timeoutMs: left }));
    } catch (error) {
      // QEMU lets one client wait beside the one that it serves; the kernel sends the next ones away.
      if (!(error instanceof ThickenError) || error.code !== 'EAGAIN') throw error;
      if (performance.now() + RETRY_MS > end) throw qmpErrors.busy(address, timeoutMs);
    }
    await sleep(RETRY_MS);
  }
}

function openSocket(where: QmpAddress, name: string, limits: WaitLimits): Promise<Socket> {
  const options: NetConnectOpts =
    where.kind === 'unix' ? { path: where.path } : { host: where.host, port: where.port, noDelay: true };
  return new Promise((resolve, reject) => {
    const socket = connect(options);
    const fail = (error: ThickenError) => {
      stop();
      socket.destroy();
      reject(error);
    };
    const onError = (error: Error) => fail(qmpErrors.cannotConnect(name, error));
    socket.once('error', onError).once('connect', () => {
      stop();
      socket.off('error', onError);
      resolve(socket);
    });
    const stop = watchLimits(limits, fail, {
      timeout: () => qmpErrors.timeout(name, 'connect', limits.timeoutMs ?? 0),
      cancelled: (reason) => qmpErrors.cancelled(name, 'connect', reason),
    });
  });
}

/** A connection that is open already. `name` is for messages, and where it could be opened again. */
export function socketTransport(socket: Socket, name: string): QmpTransport {
  return new SocketTransport(name, socket);
}

class SocketTransport implements QmpTransport {
  readonly events = true;
  readonly handshake = true;
  private readonly decoder = new ObjectDecoder();
  private readonly pid: number | null;
  private failure: Error | undefined;
  private over = false;
  private closing: Promise<void> | undefined;

  constructor(
    readonly name: string,
    private readonly socket: Socket,
  ) {
    this.pid = readPeerPid(socket);
    socket.setKeepAlive(true, KEEP_ALIVE_MS);
    // Before `start`, too, an error must not end the process.
    socket.on('error', (error) => (this.failure ??= error));
  }

  start(receiver: QmpReceiver): void {
    const end = (error: ThickenError) => {
      if (this.over) return;
      this.over = true;
      this.socket.destroy();
      receiver.ended(error);
    };
    if (this.socket.destroyed) return queueMicrotask(() => end(this.lost()));
    this.socket.on('data', (chunk: Buffer) => this.take(chunk, receiver, end));
    this.socket.once('end', () => end(this.lost())).once('close', () => end(this.lost()));
  }

  private take(chunk: Buffer, receiver: QmpReceiver, end: (error: ThickenError) => void): void {
    if (this.over) return;
    try {
      this.decoder.push(chunk, (value, bytes) => {
        if (!this.over) receiver.message(value, bytes);
      });
    } catch (error) {
      const what = error instanceof WireError ? error.message : String(error);
      end(qmpErrors.protocol(this.name, what, error));
    }
  }

  private lost(): ThickenError {
    const where = this.decoder.partial ? ' in the middle of a message' : '';
    const why = this.failure?.message ?? `QEMU closed it${where}`;
    return qmpErrors.lost(this.name, why, this.failure);
  }

  send(text: string): Promise<void> {
    return unhurried(
      new Promise((resolve, reject) => {
        if (!this.socket.writable) return reject(this.lost());
        this.socket.write(`${text}\n`, (error) => {
          if (error) reject(qmpErrors.lost(this.name, error.message, error));
          else resolve();
        });
      }),
    );
  }

  close(): Promise<void> {
    this.over = true;
    this.closing ??= this.shut();
    return this.closing;
  }

  private async shut(): Promise<void> {
    if (this.socket.closed) return;
    const closed = new Promise((resolve) => this.socket.once('close', resolve));
    // A hung peer leaves its side open, and may never take what was written last.
    const timer = setTimeout(() => this.socket.destroy(), LINGER_MS);
    this.socket.destroySoon();
    await closed;
    clearTimeout(timer);
  }

  peerPid(): number | null {
    return this.pid;
  }
}

/** Node hands out neither the descriptor of a socket nor its peer's credentials. */
function readPeerPid(socket: Socket): number | null {
  const handle = (socket as { _handle?: { fd?: unknown } | null })._handle;
  const fd = handle?.fd;
  if (typeof fd !== 'number' || fd < 0) return null;
  try {
    // 0 where the peer lives in a namespace that can't be seen from here.
    return native().peerCredentials(fd).pid || null;
  } catch {
    return null;
  }
}
