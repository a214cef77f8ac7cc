/** Options that several commands share, and how their values are read. */
import { Option, type Command } from 'commander';
import { usageError } from '../errors.js';
import type { OpenOptions } from '../open-options.js';
import type { SecretSource } from '../secret.js';
import type { AllocationRequest, Preallocation, RouteName } from '../types.js';
import { parsePercent, parseSize } from '../units.js';

export interface RangeOptions {
  offset?: number;
  length?: number;
}

export interface CommonOptions {
  json?: boolean;
  format?: string;
  backingFormat?: string;
  tlsCertificates?: string;
  secret?: SecretSource;
}

export interface QemuOptions {
  /** The monitor of a running QEMU. */
  qmp?: string;
  device?: string[];
  /** The address of the NBD server that runs in it already. */
  nbd?: string;
}

export interface MonitorOptions {
  qmp: string;
  json?: boolean;
}

export const LEVELS: Preallocation[] = ['metadata', 'falloc', 'full'];
/** A type, so that none is forgotten. */
const ROUTES: Record<RouteName, true> = {
  fallocate: true,
  'zero-write': true,
  unshare: true,
  device: true,
  qcow2: true,
  'nbd-write': true,
  populate: true,
  stream: true,
  reserve: true,
};
export const ROUTE_NAMES = Object.keys(ROUTES);

const size = (name: string) => (text: string) => parseSize(text, name);

export function addCommon(command: Command): Command {
  return addJson(
    command
      .option('--format <format>', 'the image’s format (raw, qcow2, …) instead of a probe')
      .option('--backing-format <format>', 'that of backing files, where no image records it')
      .option('--tls-certificates <folder>', 'for NBD servers that want TLS: ca-cert.pem, client-cert.pem, client-key.pem')
      .option('--secret <source>', 'the key of encrypted images: file=PATH or fd=N', parseSecret),
  );
}

function parseSecret(text: string): SecretSource {
  const [, how, where = ''] = /^(file|fd)=(.+)$/s.exec(text) ?? [];
  if (how === 'file') return { file: where };
  if (how === 'fd' && /^\d{1,9}$/.test(where)) return { fd: Number(where) };
  // What was given may be the key: it is not repeated.
  throw usageError('--secret tells where the key is, and others see what a command line says', 'give file=PATH or fd=N');
}

function addJson(command: Command): Command {
  return command.option('--json', 'print exactly one JSON document on stdout');
}

export function addMonitor(command: Command): Command {
  const where = 'the QMP monitor: a socket’s path with a slash, or tcp:HOST:PORT';
  return addJson(command.requiredOption('--qmp <socket>', where));
}

export function addQemu(command: Command): Command {
  const gather = (name: string, names: string[] = []) => [...names, name];
  return command
    .option('--qmp <socket>', 'the monitor of the QEMU that has the disk open')
    .option('--device <name>', 'its disk: the id of a -device, a -drive, a node, or a QOM path', gather)
    .option('--nbd <uri>', 'where its NBD server listens, if one runs already');
}

export function addRange(command: Command): Command {
  return command
    .option('--offset <size>', 'first byte (suffixes k, M, G, T, P, E)', size('offset'))
    .option('--length <size>', 'bytes; to the end by default', size('length'));
}

export function addLevel(command: Command): Command {
  const level = new Option('--preallocation <level>', 'how far to go');
  return command.addOption(level.choices(LEVELS).default('falloc'));
}

/** A positive number of bytes or requests a second; `50M`, or `50M/s`. */
export function parseRate(name: string, unlimited = 'leave it out') {
  return (text: string): number => {
    const rate = parseSize(text.replace(/\/s$/, ''), name);
    if (rate > 0) return rate;
    throw usageError(`${name} is 0`, `give a number above 0, or ${unlimited} for no limit`);
  };
}

/** Bytes a second, as `parseRate` has them; Infinity for `none`. */
export function parseLimit(text: string): number {
  return text === 'none' ? Infinity : parseRate('rate', 'say none')(text);
}

export function parseKeepFree(text: string): NonNullable<AllocationRequest['keepFree']> {
  if (!text.endsWith('%')) return parseSize(text, 'keep-free');
  if (parsePercent(text) !== null) return text as `${number}%`;
  throw usageError(`keep-free ${JSON.stringify(text)} is not a share`, 'give a size, or 0% to 100%');
}

/** Only what was given: an absent option is an absent key. */
export function rangeOf({ offset, length }: RangeOptions): RangeOptions {
  return { ...(offset !== undefined && { offset }), ...(length !== undefined && { length }) };
}

/** Options with the key itself, which a pipe gives once only; wiped when `work` has ended. */
export async function withKey<Options extends CommonOptions, T>(
  options: Options,
  work: (options: Options) => Promise<T>,
): Promise<T> {
  if (options.secret === undefined) return work(options);
  const { readSecret } = await import('../secret.js');
  const secret = await readSecret(options.secret);
  try {
    return await work({ ...options, secret });
  } finally {
    secret.fill(0);
  }
}

export function openOptionsOf(options: CommonOptions & QemuOptions): OpenOptions & { nbd?: string } {
  const { format, backingFormat, tlsCertificates, secret, nbd } = options;
  return {
    ...(format !== undefined && { format }),
    ...(backingFormat !== undefined && { backingFormat }),
    ...(tlsCertificates !== undefined && { tlsCertificates }),
    ...(secret !== undefined && { secret }),
    ...(nbd !== undefined && { nbd }),
  };
}
