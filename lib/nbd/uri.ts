/** NBD URIs: nbd://host:port/export, nbd+unix:///export?socket=/path; with TLS nbds and nbds+unix. */
import { isIPv6 } from 'node:net';
import { nbdErrors } from './errors.js';

export const DEFAULT_PORT = 10809;

/** Where a server listens. */
export type NbdEndpoint = { host: string; port: number } | { socketPath: string };

export interface NbdUri {
  endpoint: NbdEndpoint;
  exportName: string;
  tls: boolean;
  /** The name that the server's certificate must bear, where it is not the host's. */
  tlsHostname?: string;
  /** A folder of ca-cert.pem, client-cert.pem and client-key.pem. */
  tlsCertificates?: string;
}

/** The longest export name that the protocol allows; bytes. */
export const MOST_NAME = 4096;
/** sun_path of unix(7), less the NUL at its end. */
const MOST_SOCKET_PATH = 107;

const SHAPE = /^(nbds?)(\+unix)?:\/\/([^/?#]*)(?:\/([^?#]*))?(?:\?([^#]*))?(#.*)?$/su;
const PARAMETERS = new Set(['socket', 'tls-hostname', 'tls-certificates']);

export function isNbdUri(text: string): boolean {
  return /^nbds?(\+[a-z]+)?:/i.test(text);
}

/** Throws USAGE where the text is not such a URI, or says what makes no sense. */
export function parseNbdUri(text: string): NbdUri {
  const fail = (what: string) => nbdErrors.uri(text, what);
  const match = SHAPE.exec(text.replace(/^[a-z+]+(?=:)/i, (scheme) => scheme.toLowerCase()));
  if (!match) throw fail('it does not have that form');
  const [, scheme, unix, authority = '', name = '', query = '', fragment] = match;
  if (fragment !== undefined) throw fail('it has a #fragment; write %23 in a name');
  const exportName = decode(name, fail);
  if (Buffer.byteLength(exportName) > MOST_NAME) throw fail('the export name is too long');
  const parameters = parseQuery(query, fail);
  const endpoint = unix
    ? unixEndpoint(authority, parameters.get('socket'), fail)
    : tcpEndpoint(authority, parameters.has('socket'), fail);
  const tls = scheme === 'nbds';
  return { endpoint, exportName, tls, ...tlsParameters(parameters, tls, fail) };
}

/** The server's address for messages. */
export function describeEndpoint(endpoint: NbdEndpoint): string {
  if ('socketPath' in endpoint) return `nbd+unix://?socket=${endpoint.socketPath}`;
  const { host, port } = endpoint;
  return `nbd://${host.includes(':') ? `[${host}]` : host}:${port}`;
}

type Fail = (what: string) => Error;

function decode(text: string, fail: Fail): string {
  let decoded;
  try {
    decoded = decodeURIComponent(text);
  } catch {
    throw fail('a % is not followed by two hexadecimal digits of UTF-8');
  }
  if (decoded.includes('\0')) throw fail('it contains a NUL character');
  return decoded;
}

function parseQuery(query: string, fail: Fail): Map<string, string> {
  const parameters = new Map<string, string>();
  for (const part of query.split('&').filter((text) => text !== '')) {
    const equals = part.indexOf('=');
    const key = decode(equals < 0 ? part : part.slice(0, equals), fail);
    if (!PARAMETERS.has(key)) throw fail(`parameter ${JSON.stringify(key)} is not known`);
    if (parameters.has(key)) throw fail(`parameter ${key} is there twice`);
    const value = equals < 0 ? '' : decode(part.slice(equals + 1), fail);
    if (value === '') throw fail(`parameter ${key} is empty`);
    parameters.set(key, value);
  }
  return parameters;
}

function unixEndpoint(authority: string, socketPath: string | undefined, fail: Fail): NbdEndpoint {
  if (authority !== '') throw fail('a unix socket has no host; write three slashes');
  if (socketPath === undefined) throw fail('it names no socket');
  if (Buffer.byteLength(socketPath) > MOST_SOCKET_PATH) {
    throw fail(`a socket's path has at most ${MOST_SOCKET_PATH} bytes`);
  }
  return { socketPath };
}

function tcpEndpoint(authority: string, hasSocket: boolean, fail: Fail): NbdEndpoint {
  if (hasSocket) throw fail('a socket parameter goes with nbd+unix');
  if (authority.includes('@')) throw fail('user names are not supported');
  const match = /^(?:\[([^\]]*)\]|([^:[\]]*))(?::([0-9]*))?$/.exec(authority);
  if (!match) throw fail('the host or port is malformed; IPv6 addresses go in brackets');
  const [, bracketed, plain = '', digits = ''] = match;
  const host = decode(bracketed ?? plain, fail);
  if (bracketed !== undefined && !isIPv6(host)) throw fail('there is no IPv6 address in brackets');
  if (/[\s\p{C}]/u.test(host)) throw fail('the host is malformed');
  return { host: host || 'localhost', port: portOf(digits, fail) };
}

function portOf(digits: string, fail: Fail): number {
  const port = digits === '' ? DEFAULT_PORT : Number(digits);
  if (port < 1 || port > 65535) throw fail('a port is a number from 1 to 65535');
  return port;
}

function tlsParameters(parameters: Map<string, string>, tls: boolean, fail: Fail) {
  const tlsHostname = parameters.get('tls-hostname');
  const tlsCertificates = parameters.get('tls-certificates');
  if (!tls && (tlsHostname ?? tlsCertificates) !== undefined) {
    throw fail('tls parameters go with nbds and nbds+unix');
  }
  return {
    ...(tlsHostname !== undefined && { tlsHostname }),
    ...(tlsCertificates !== undefined && { tlsCertificates }),
  };
}
