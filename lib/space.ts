/** Whether the file system can give what a plan takes. */
import { parsePercent } from './units.js';
import { usageError } from './errors.js';
import { checkBytes } from './range.js';
import type { Filesystem, Space } from './filesystem.js';
import type { Survey } from './plan.js';
import type { AllocationRequest } from './types.js';

/** An extent record takes 12 (ext4), 16 (xfs) or 53 bytes (btrfs); blocks are at least half full. */
const RECORD_BYTES = 128;
/** A block map has one 4-byte pointer a block. */
const POINTER_BYTES = 4;

/** Bytes that the missing regions will take: their blocks, and the file system's records of them. */
export function bytesNeeded(survey: Survey, filesystem: Filesystem): number {
  if (survey.needed === 0) return 0;
  const { blockSize, type, abilities } = filesystem;
  // The image's last block may be counted in part only.
  const data = Math.ceil(survey.needed / blockSize) * blockSize;
  const mapped = type === 'ext4' && !abilities.fallocate;
  const records = mapped ? (data / blockSize) * POINTER_BYTES : survey.pieces * RECORD_BYTES;
  return data + Math.ceil(records / blockSize) * blockSize;
}

/** Bytes to keep free of a file system. Throws USAGE or RANGE for what is no amount of space. */
export function keepFreeBytes(keepFree: AllocationRequest['keepFree'], space: Space): number {
  if (keepFree === undefined) return 0;
  if (typeof keepFree === 'number') return checkBytes('keepFree', keepFree);
  const share = parsePercent(keepFree);
  if (share === null) {
    throw usageError(
      `keepFree ${JSON.stringify(keepFree)} is not a share`,
      'give bytes, or 0% to 100%',
    );
  }
  return space.total === Infinity ? 0 : Math.ceil(space.total * share);
}
