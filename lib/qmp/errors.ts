/** The errors of QMP connections and of block jobs: what happened, on which monitor; what to do. */
import { ThickenError, type ErrorDetails } from '../errors.js';

/** What a peer sends may end up on a terminal, and be of any length. */
const MOST_FOREIGN_CHARACTERS = 500;

/** Text of the peer's, safe to print: bounded, without control or direction characters. */
export function printable(text: string): string {
  const start = text.slice(0, MOST_FOREIGN_CHARACTERS);
  const safe = start.replace(/[\s\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]+/gu, ' ').trim();
  return text.length > start.length ? `${safe}…` : safe;
}

function build(code: string, what: string, remedy: string, details: ErrorDetails = {}) {
  return new ThickenError(code, `${what}; ${remedy}`, details);
}

const on = (monitor: string) => ` on monitor ${JSON.stringify(printable(monitor))}`;

const RUNS_STILL = 'find out whether QEMU still runs, and connect again';

const CONNECT_REMEDIES: Record<string, string> = {
  ENOENT: 'check the name, and that QEMU runs with `-qmp unix:PATH,server=on,wait=off`',
  ECONNREFUSED: 'check that QEMU still runs: nothing listens there',
  EACCES: 'run as the user who runs QEMU, or as root',
  EPERM: 'run as the user who runs QEMU, or as root',
  ENOTFOUND: 'check the host’s name',
};

export const qmpErrors = {
  badAddress: (text: string) =>
    build(
      'USAGE',
      `${JSON.stringify(printable(text))} is no address of a monitor`,
      'give unix:PATH or a path with a slash, or tcp:HOST:PORT',
    ),

  cannotConnect: (monitor: string, cause: NodeJS.ErrnoException) =>
    build(
      cause.code ?? 'QMP_LOST',
      `can't connect: ${printable(cause.message)}${on(monitor)}`,
      CONNECT_REMEDIES[cause.code ?? ''] ?? 'check the address, and that QEMU runs',
      { errno: cause.errno && Math.abs(cause.errno), syscall: 'connect', path: monitor, cause },
    ),

  busy: (monitor: string, milliseconds: number) =>
    build(
      'MONITOR_BUSY',
      `no greeting came within ${Math.round(milliseconds)} ms${on(monitor)}: ` +
        'most likely another client holds it, and a monitor serves one at a time',
      'end the other client (for a guest of libvirt’s, name it with --domain), or give QEMU a ' +
        'second -qmp socket',
      { path: monitor },
    ),

  lost: (monitor: string, why: string, cause?: unknown) =>
    build('QMP_LOST', `the connection was lost${on(monitor)}: ${why}`, RUNS_STILL, {
      path: monitor,
      cause,
    }),

  protocol: (monitor: string, what: string, cause?: unknown) =>
    build(
      'QMP_PROTOCOL',
      `what came is no QMP${on(monitor)}: ${what}`,
      'check that the address is that of a QMP monitor (-qmp, or -mon with mode=control), not of ' +
        'a human monitor, a guest agent or a console',
      { path: monitor, cause },
    ),

  command: (monitor: string, command: string, qmpClass: string, desc: string) =>
    build(
      'QMP_COMMAND',
      `${command} failed${on(monitor)}: ${printable(desc)}`,
      qmpClass === 'CommandNotFound' ? 'this QEMU lacks the command' : 'see QEMU’s words for why',
      { path: monitor, command, qmpClass, desc },
    ),

  timeout: (monitor: string, what: string, milliseconds: number) =>
    build(
      'QMP_TIMEOUT',
      `${what} was not answered within ${Math.round(milliseconds)} ms${on(monitor)}`,
      'see whether QEMU is stopped or waits for its storage; the command may still be carried out',
      { path: monitor, command: what },
    ),

  cancelled: (monitor: string, what: string, cause?: unknown) =>
    build(
      'CANCELLED',
      `${what} was cancelled${on(monitor)}`,
      'what has been sent by then may still be carried out',
      { path: monitor, command: what, cause },
    ),

  closed: (monitor: string) =>
    build('CLOSED', `the connection has been closed${on(monitor)}`, 'connect again', {
      path: monitor,
    }),

  notReady: (monitor: string, state: string) =>
    build('USAGE', `the connection is ${state}${on(monitor)}`, 'await connect() first', {
      path: monitor,
    }),

  tooMany: (monitor: string, most: number) =>
    build(
      'QMP_BUSY',
      `${most} commands are without an answer${on(monitor)}`,
      'await some of them before sending more; if none is answered, QEMU hangs',
      { path: monitor },
    ),

  noEvents: (monitor: string) =>
    build(
      'UNSUPPORTED',
      `events do not come by themselves${on(monitor)}`,
      'ask for the state with a query instead',
      { path: monitor },
    ),
};

export interface JobPlace {
  monitor: string;
  id: string;
  type: string;
}

const job = ({ id, type }: JobPlace) => `${type} job ${JSON.stringify(printable(id))}`;

const NO_JOBS = 'there are no jobs at all';
const MOST_LISTED = 20;

function listed(names: readonly string[]): string {
  const quoted = names.slice(0, MOST_LISTED).map((name) => JSON.stringify(printable(name)));
  return [...quoted, ...(names.length > MOST_LISTED ? ['…'] : [])].join(', ');
}

const JOB_REMEDIES: Record<string, string> = {
  ENOSPC: 'free some space where the active image lies, and run it again: what was copied stays',
  EDQUOT: 'raise the quota, and run it again: what was copied stays',
  EIO: 'check the storage of the whole backing chain (dmesg), and run it again',
};

export const jobErrors = {
  unknown: (monitor: string, id: string, known: readonly string[]) =>
    build(
      'UNKNOWN_JOB',
      `there is no job ${JSON.stringify(printable(id))}${on(monitor)}`,
      known.length === 0 ? NO_JOBS : `there is ${listed(known)}`,
      { path: monitor },
    ),

  unnamed: (monitor: string, known: readonly string[]) =>
    build(
      'USAGE',
      `no job is named${on(monitor)}`,
      known.length === 0 ? NO_JOBS : `name one of ${known.length}: ${listed(known)}`,
      { path: monitor },
    ),

  gone: (place: JobPlace) =>
    build(
      'JOB_GONE',
      `the ${job(place)} is gone, and how it ended can't be told${on(place.monitor)}`,
      'see what the image still lacks (thicken verify); somebody else may have dismissed the job',
      { path: place.monitor },
    ),

  failed: (place: JobPlace, code: string, desc: string) =>
    build(
      code,
      `the ${job(place)} failed${on(place.monitor)}: ${printable(desc)}`,
      JOB_REMEDIES[code] ?? 'see QEMU’s words for why; what was copied stays',
      { path: place.monitor, desc },
    ),

  unfollowed: (place: JobPlace) =>
    build('CANCELLED', `the ${job(place)} is no longer watched${on(place.monitor)}`, 'it runs on', {
      path: place.monitor,
    }),
};
