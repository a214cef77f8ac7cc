/** Errors of the NBD client. `path` is always the server's address. */
import { build, rangeError, usageError, type ErrorDetails } from '../errors.js';

/** What an errno of the NBD protocol is called; the numbers are Linux's. */
const ERRNO_NAMES: Record<number, string> = {
  1: 'EPERM',
  5: 'EIO',
  12: 'ENOMEM',
  22: 'EINVAL',
  28: 'ENOSPC',
  75: 'EOVERFLOW',
  95: 'ENOTSUP',
  108: 'ESHUTDOWN',
};

const REMEDIES: Record<string, string> = {
  EPERM: 'export the image writable, or ask for less',
  EIO: 'check the storage on the server’s side',
  ENOMEM: 'give the server more memory, or use fewer requests at a time',
  EINVAL: 'check the range and the server’s block sizes',
  ENOSPC: 'free some space on the server’s side',
  EOVERFLOW: 'ask for a smaller range',
  ENOTSUP: 'use a server that can do it',
  ESHUTDOWN: 'start the server again',
};

/** The longest text of a server's that is shown; characters. */
const MOST_TEXT = 200;

/**
 * A server's words, fit for a terminal and a log: control characters, invisible format characters
 * and line ends become spaces, and the length is bounded.
 */
export function sanitise(text: string): string {
  const plain = text
    .slice(0, 8 * MOST_TEXT)
    .replace(/[\s\p{C}]+/gu, ' ')
    .trim();
  const characters = [...plain];
  return characters.length > MOST_TEXT ? `${characters.slice(0, MOST_TEXT).join('')}…` : plain;
}

function quoted(text: string): string {
  const words = sanitise(text);
  return words === '' ? '' : `: the server says ${JSON.stringify(words)}`;
}

export const nbdErrors = {
  uri: (uri: string, what: string) =>
    usageError(
      `${JSON.stringify(sanitise(uri))} is no NBD URI: ${what}`,
      'write nbd://host:port/export or nbd+unix:///export?socket=/path',
    ),

  option: (what: string, remedy: string) => usageError(what, remedy),

  lost: (path: string, what: string, cause?: unknown) =>
    build('NBD_LOST', `the connection is lost (${what})`, 'check the server, and run it again', {
      path,
      errno: errnoOf(cause),
      cause,
    }),

  protocol: (path: string, what: string, details: ErrorDetails = {}) =>
    build(
      'NBD_PROTOCOL',
      `the server breaks the NBD protocol: ${what}`,
      'check that the address is an NBD server’s, and report it to its makers',
      { ...details, path },
    ),

  refused: (path: string, option: string, answer: string, message: string) =>
    build(
      'NBD_REFUSED',
      `the server refuses ${option} (${answer})${quoted(message)}`,
      refusalRemedy(answer),
      { path },
    ),

  tooOld: (path: string, what: string) =>
    build('NBD_REFUSED', `the server is too old: ${what}`, 'use a server of the last ten years', {
      path,
    }),

  tls: (path: string, what: string, cause?: unknown) =>
    build('NBD_TLS', `TLS can't be set up (${sanitise(what)})`, 'check the certificates and names', {
      path,
      cause,
    }),

  timeout: (path: string, what: string, details: ErrorDetails = {}) =>
    build('NBD_TIMEOUT', what, 'check the server and the network, or allow more time', {
      ...details,
      path,
    }),

  closed: (path: string) =>
    build('CLOSED', 'the connection has been closed', 'connect again', { path }),

  cancelled: (path: string, details: ErrorDetails = {}) =>
    build('CANCELLED', 'cancelled', 'run it again: it continues where it stopped', {
      ...details,
      path,
    }),

  tooLarge: (path: string, size: bigint) =>
    rangeError(`the export has ${size} bytes`, 'use one of at most 2^53-1 bytes', { path }),

  range: (what: string, remedy: string, details: ErrorDetails) => rangeError(what, remedy, details),

  /** Something the server has not offered; the same code as if it had been asked in vain. */
  notOffered: (path: string, what: string, code: 'ENOTSUP' | 'EPERM' = 'ENOTSUP') =>
    build(code, `the server does not offer ${what}`, REMEDIES[code] ?? '', { path }),

  /** A request that the server answered with an error. Unknown numbers mean EINVAL (NBD protocol). */
  command: (errno: number, command: string, message: string, details: ErrorDetails) => {
    const known = ERRNO_NAMES[errno];
    const code = known ?? 'EINVAL';
    const name = known ?? `the unknown error ${errno}`;
    const what = `${command} failed with ${name}${quoted(message)}`;
    return build(code, what, REMEDIES[code] ?? '', { ...details, errno, syscall: command });
  },
};

function refusalRemedy(answer: string): string {
  if (answer === 'TLS_REQD') return 'use nbds:// and give the certificates';
  if (answer === 'UNKNOWN') return 'check the export’s name';
  return 'check the server’s configuration';
}

function errnoOf(cause: unknown): number | undefined {
  const errno = (cause as { errno?: unknown } | undefined)?.errno;
  return typeof errno === 'number' ? Math.abs(errno) : undefined;
}
