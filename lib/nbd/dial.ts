/** From an address to a server that has greeted, through TLS where that is asked for. */
import type { Duplex } from 'node:stream';
import { ThickenError } from '../errors.js';
import { nbdErrors } from './errors.js';
import { Handshake } from './handshake.js';
import { openSocket, readCertificates, Transport, type TlsOptions } from './transport.js';
import {
  describeEndpoint,
  MOST_NAME,
  parseNbdUri,
  type NbdEndpoint,
  type NbdUri,
} from './uri.js';

/** An URI may come in parts, too. */
export type NbdAddress = NbdEndpoint | NbdUri | { stream: Duplex };

export interface DialOptions {
  /** The default export (an empty name), or the URI's, unless this says otherwise. */
  exportName?: string;
  /** TLS before anything else is said; with a `nbds` URI always. */
  tls?: TlsOptions | true;
  /** A folder as `tls-certificates` of an URI names it, where TLS is asked for and the URI names none. */
  tlsCertificates?: string | undefined;
  /** Milliseconds for connecting and for the handshake; 30 s by default. */
  timeoutMs?: number;
  /** Cancels connecting and the handshake; of no effect afterwards. */
  signal?: AbortSignal | undefined;
}

const DEFAULT_TIMEOUT_MS = 30_000;
const CLOSE_MS = 2_000;

type Talk<T> = (handshake: Handshake, transport: Transport, exportName: string) => Promise<T>;

/** Connects, greets, and leaves the rest to `talk`; with `once`, the connection ends after that. */
export async function dial<T>(
  address: NbdAddress | string,
  options: DialOptions,
  talk: Talk<T>,
  once = false,
): Promise<T> {
  const { uri, place } = partsOf(address);
  const exportName = nameOf(options.exportName ?? uri?.exportName ?? '');
  const ms = timeoutOf(options);
  const path = 'stream' in place ? 'an open connection' : describeEndpoint(place);
  const tls = await tlsOf(options, uri, path);
  if (options.signal?.aborted) throw nbdErrors.cancelled(path);
  const transport = new Transport('stream' in place ? place.stream : openSocket(place), path);
  const unguard = guard(transport, ms, options.signal);
  try {
    const handshake = new Handshake(transport);
    await handshake.greet();
    if (tls) await secure(handshake, transport, tls, place);
    const result = await talk(handshake, transport, exportName);
    if (once) await transport.end(nbdErrors.closed(path), CLOSE_MS);
    return result;
  } catch (error) {
    throw giveUp(transport, error);
  } finally {
    unguard();
  }
}

function partsOf(address: NbdAddress | string): { uri?: NbdUri; place: NbdEndpoint | { stream: Duplex } } {
  if (typeof address !== 'string' && !('endpoint' in address)) return { place: address };
  const uri = typeof address === 'string' ? parseNbdUri(address) : address;
  return { uri, place: uri.endpoint };
}

function nameOf(name: string): string {
  if (Buffer.byteLength(name) <= MOST_NAME && !name.includes('\0')) return name;
  throw nbdErrors.option('the export name is too long, or has a NUL character', 'give another');
}

function timeoutOf({ timeoutMs = DEFAULT_TIMEOUT_MS }: DialOptions): number {
  if (Number.isSafeInteger(timeoutMs) && timeoutMs > 0 && timeoutMs < 2 ** 31) return timeoutMs;
  throw nbdErrors.option(`timeoutMs is ${timeoutMs}`, 'give milliseconds, from 1 to 2^31-1');
}

async function tlsOf(
  { tls: asked, tlsCertificates }: DialOptions,
  uri: NbdUri | undefined,
  path: string,
): Promise<TlsOptions | undefined> {
  if (!asked && !uri?.tls) return undefined;
  const { tlsCertificates: folder = tlsCertificates, tlsHostname: servername } = uri ?? {};
  return {
    ...(folder !== undefined && (await readCertificates(folder, path))),
    ...(servername !== undefined && { servername }),
    ...(asked !== true && asked),
  };
}

async function secure(
  handshake: Handshake,
  transport: Transport,
  tls: TlsOptions,
  place: NbdEndpoint | { stream: Duplex },
): Promise<void> {
  await handshake.askTls();
  await transport.startTls(tls, 'host' in place ? place.host : 'localhost');
}

/** Fails the transport when time is up or the signal aborts, until it is told to stop. */
function guard(transport: Transport, ms: number, signal: AbortSignal | undefined): () => void {
  const { path } = transport;
  const late = () => transport.fail(nbdErrors.timeout(path, `no connection within ${ms} ms`));
  const aborted = () => transport.fail(nbdErrors.cancelled(path));
  const timer = setTimeout(late, ms);
  signal?.addEventListener('abort', aborted);
  return () => {
    clearTimeout(timer);
    signal?.removeEventListener('abort', aborted);
  };
}

/** The first reason counts: what fails after the transport was lost says less. */
function giveUp(transport: Transport, error: unknown): unknown {
  if (transport.lost) return transport.lost;
  const { path } = transport;
  transport.fail(error instanceof ThickenError ? error : nbdErrors.closed(path));
  return error;
}
