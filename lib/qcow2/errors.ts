/** What the native qcow2 code refuses, as errors that say where and what to do. */
import { build, errors, type ThickenError } from '../errors.js';
import type { Qcow2Outcome } from '../native.js';

const CHECK = 'look at it with `qemu-img check`; nothing has been changed';

/** Where the message does not tell what to do about it. */
const REMEDIES: Record<string, string> = {
  NOT_QCOW2: 'say --format raw if it is a raw disk',
  UNSUPPORTED: 'convert it with `qemu-img convert`',
  QCOW2_UNKNOWN_FEATURE: 'use a thicken that knows it, or convert the image with `qemu-img convert`',
  QCOW2_DIRTY: 'nothing has been changed',
  QCOW2_CORRUPT: CHECK,
  QCOW2_OUTSIDE_FILE: CHECK,
  QCOW2_OVERLAP: CHECK,
  QCOW2_ABSURD: CHECK,
  STALE: 'let the image be as it is while thicken runs, and run it again',
};

/** The error for an outcome; null where it is none. */
export function refusalOf(outcome: Qcow2Outcome, path: string): ThickenError | null {
  const { code, message, at, size } = outcome;
  if (code === 'OK') return null;
  if (code === 'NEEDS_POPULATE') return errors.needsPopulate(path, at, size);
  const place = size > 0 ? { offset: at, length: size } : {};
  const stable = code === 'STALE' ? 'CHANGED' : code;
  return build(stable, message, REMEDIES[code] ?? CHECK, { path, ...place });
}

export function throwIfRefused(outcome: Qcow2Outcome, path: string): void {
  const refusal = refusalOf(outcome, path);
  if (refusal) throw refusal;
}

export const qcow2Errors = {
  dataFileWanted: (path: string, dataFile: string) =>
    build(
      'FORMAT_REQUIRED',
      `its data lies in another file (${JSON.stringify(dataFile)}), which is not opened on a header’s word alone`,
      'say --format qcow2 if you trust the image',
      { path },
    ),

  dataFileUnknown: (path: string) =>
    build('UNSUPPORTED', 'its data lies in another file, of which the image records no name', CHECK, { path }),

  dataFileElsewhere: (path: string, dataFile: string) =>
    build(
      'UNSUPPORTED',
      `its data file ${JSON.stringify(dataFile)} is no local file`,
      'allocate what it lies on',
      { path },
    ),
};
