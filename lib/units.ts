import { usageError } from './errors.js';

const SUFFIXES = ['', 'k', 'M', 'G', 'T', 'P', 'E'];

/**
 * Bytes of a size as QEMU writes them: a number with an optional suffix k, K, M, G, T, P or E
 * (powers of 1024). Throws USAGE for anything else, and where the result is not a whole number of
 * bytes up to 2^53-1.
 */
export function parseSize(text: string, name = 'size'): number {
  const match = /^(\d+(?:\.\d+)?)([kKMGTPE]?)$/.exec(text);
  if (!match) {
    throw usageError(
      `${name} ${JSON.stringify(text)} is not a size`,
      'give bytes, or a number with one of the suffixes k, M, G, T, P, E',
    );
  }
  const suffix = match[2] === 'K' ? 'k' : (match[2] ?? '');
  const exact = Number(match[1]) * 1024 ** SUFFIXES.indexOf(suffix);
  const bytes = suffix === '' ? exact : Math.round(exact);
  if (!Number.isSafeInteger(bytes)) {
    throw usageError(
      `${name} ${JSON.stringify(text)} is not a whole number of bytes up to 2^53-1`,
      'give another size',
    );
  }
  return bytes;
}

/** A share of a file system (`"10%"`), as a fraction from 0 to 1; null where it is none. */
export function parsePercent(text: string): number | null {
  const match = /^(\d+(?:\.\d+)?)%$/.exec(text);
  if (!match) return null;
  const percent = Number(match[1]);
  return percent <= 100 ? percent / 100 : null;
}

/** Bytes for people: `1.5 GiB`. */
export function formatBytes(bytes: number): string {
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < SUFFIXES.length - 1) {
    value /= 1024;
    unit++;
  }
  if (unit === 0) return `${bytes} B`;
  const digits = value >= 100 || Number.isInteger(value) ? 0 : value >= 10 ? 1 : 2;
  return `${value.toFixed(digits)} ${SUFFIXES[unit]?.toUpperCase()}iB`;
}

/** Seconds for people: `2:05`, `1:02:05`. */
export function formatSeconds(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  if (parts[0] === 0) parts.shift();
  return parts.map((part, i) => (i === 0 ? `${part}` : `${part}`.padStart(2, '0'))).join(':');
}
