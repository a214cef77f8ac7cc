/** A byte stream to a server: opened, upgraded to TLS, and lost at most once. */
import { readFile } from 'node:fs/promises';
import { createConnection, isIP, type Socket } from 'node:net';
import { join } from 'node:path';
import type { Duplex } from 'node:stream';
import { connect as connectTls } from 'node:tls';
import type { ThickenError } from '../errors.js';
import { nbdErrors } from './errors.js';
import type { NbdEndpoint } from './uri.js';

export interface TlsOptions {
  /** PEM; without it, the system's authorities. */
  ca?: string | Buffer;
  /** PEM; where the server asks for a client's certificate. */
  cert?: string | Buffer;
  key?: string | Buffer;
  /** The name that the certificate must bear: the host's, or `localhost` for a unix socket. */
  servername?: string;
}

/** The files of a `tls-certificates` folder; the client's own may be missing. */
export async function readCertificates(folder: string, path: string): Promise<TlsOptions> {
  try {
    const ca = await readFile(join(folder, 'ca-cert.pem'));
    const own = ['client-cert.pem', 'client-key.pem'].map((name) => readFile(join(folder, name)));
    const [cert, key] = await Promise.all(own.map((file) => file.catch(missing)));
    return { ca, ...(cert && { cert }), ...(key && { key }) };
  } catch (error) {
    throw nbdErrors.tls(path, error instanceof Error ? error.message : String(error), error);
  }
}

function missing(error: unknown): undefined {
  if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
}

/** The socket need not be connected yet: what is written waits, and a failure loses the transport. */
export function openSocket(endpoint: NbdEndpoint): Socket {
  if ('socketPath' in endpoint) return createConnection({ path: endpoint.socketPath });
  // Nagle's algorithm would hold a request back until the answer to the one before.
  return createConnection({ host: endpoint.host, port: endpoint.port, noDelay: true });
}

export interface TransportHandlers {
  data(chunk: Buffer): void;
  /** Once, whatever the reason. */
  lost(error: ThickenError): void;
  /** The stream takes more after it was `blocked`. */
  drain(): void;
}

export class Transport {
  handlers: TransportHandlers = { data: () => undefined, lost: () => undefined, drain: () => undefined };
  private failure: ThickenError | undefined;
  private corked = false;
  private securing = false;
  private rejectTls: ((error: ThickenError) => void) | undefined;
  private readonly listeners = {
    data: (chunk: Buffer) => this.handlers.data(chunk),
    drain: () => this.handlers.drain(),
    end: () => this.fail(nbdErrors.lost(this.path, 'the server has closed it')),
    close: () => this.fail(nbdErrors.lost(this.path, 'it was closed')),
  };

  constructor(
    private stream: Duplex,
    readonly path: string,
  ) {
    this.attach();
  }

  /** Why it is of no use any more. */
  get lost(): ThickenError | undefined {
    return this.failure;
  }

  /** Whether more should wait for `drain`. */
  get blocked(): boolean {
    return this.stream.writableNeedDrain;
  }

  /**
   * All that is sent before the next tick goes out in one system call. `body` must stay as it is
   * until `sent` is called: it is not copied.
   */
  send(head: Buffer, body?: Buffer, sent?: () => void): void {
    if (this.failure) return;
    this.cork();
    this.stream.write(head);
    if (body) this.stream.write(body, sent);
  }

  /**
   * Makes the stream a TLS client's, of a server that proves to be `host`; nothing of the stream
   * may have been left unread. Resolves when that is proven.
   */
  startTls(options: TlsOptions, host: string): Promise<void> {
    const raw = this.stream;
    this.detach();
    this.securing = true;
    this.stream = this.tlsClient(raw, options, options.servername ?? host);
    this.attach();
    return new Promise((resolve, reject) => {
      this.rejectTls = reject;
      this.stream.once('secureConnect', () => {
        this.securing = false;
        resolve();
      });
    });
  }

  private tlsClient(socket: Duplex, options: TlsOptions, name: string): Duplex {
    // `host` is the identity to check; SNI carries no addresses (RFC 6066).
    const identity = { host: name, servername: isIP(name) ? '' : name };
    try {
      return connectTls({ socket, ...options, ...identity, minVersion: 'TLSv1.2' });
    } catch (error) {
      throw nbdErrors.tls(this.path, error instanceof Error ? error.message : String(error), error);
    }
  }

  /** Tells the handlers, once, and destroys the stream. */
  fail(error: ThickenError): void {
    if (this.failure) return;
    this.failure = error;
    this.stream.destroy();
    this.rejectTls?.(error);
    this.handlers.lost(error);
  }

  /** Ends the stream after what has been sent; resolves when it has closed, or after `ms`. */
  end(error: ThickenError, ms: number): Promise<void> {
    if (this.failure || this.stream.destroyed) return Promise.resolve(this.fail(error));
    return new Promise((resolve) => {
      const close = () => {
        clearTimeout(timer);
        this.fail(error);
        resolve();
      };
      const timer = setTimeout(close, ms);
      this.handlers = { ...this.handlers, data: () => undefined };
      this.stream.once('close', close);
      this.stream.end();
    });
  }

  private attach(): void {
    const { stream } = this;
    // Stays for good: a stream may fail more than once, and after it has been destroyed.
    stream.on('error', (error) => stream === this.stream && this.streamFailed(error));
    for (const [name, listener] of Object.entries(this.listeners)) stream.on(name, listener);
    if (stream.destroyed || stream.readableEnded) this.listeners.close();
  }

  private detach(): void {
    for (const [name, listener] of Object.entries(this.listeners)) this.stream.off(name, listener);
  }

  private streamFailed(error: Error): void {
    const lost = this.securing
      ? nbdErrors.tls(this.path, error.message, error)
      : nbdErrors.lost(this.path, error.message, error);
    this.fail(lost);
  }

  private cork(): void {
    if (this.corked) return;
    this.corked = true;
    const { stream } = this;
    stream.cork();
    process.nextTick(() => {
      this.corked = false;
      stream.uncork();
    });
  }
}
