/** Whether the file system can give what a plan takes. */
import { parsePercent } from './units.js';
import { usageError } from './errors.js';
import { checkBytes } from './range.js';
import type { Descriptor } from './descriptor.js';
import { readSpace, type Filesystem, type Space } from './filesystem.js';
import { native, SYNC_FILESYSTEM } from './native.js';
import type { Survey } from './plan.js';
import type { AllocationRequest, ImageInfo } from './types.js';

/** An extent record takes 12 (ext4), 16 (xfs) or 53 bytes (btrfs); blocks are at least half full. */
const RECORD_BYTES = 128;
/** A block map has one 4-byte pointer a block. */
const POINTER_BYTES = 4;

/** Where the space comes from that is allocated. */
export interface Storage {
  file: Descriptor;
  filesystem: Filesystem;
}

const NO_SPACE: Space = { available: 0, total: 0, quota: false };

export function spaceOf({ file, filesystem }: Storage): Promise<Space> {
  return readSpace(file, filesystem.type);
}

/** What `info` tells of where an image lies; `reflinked`: null where the extents don't tell. */
export async function filesystemInfo(
  storage: Storage,
  reflinked: boolean | null,
): Promise<NonNullable<ImageInfo['filesystem']>> {
  const { type, abilities, cow } = storage.filesystem;
  const { available: free } = await spaceOf(storage);
  const names = Object.entries(abilities).filter(([, has]) => has).map(([name]) => name);
  return { type, free, abilities: names, cow, reflinked };
}

/** Bytes that the missing regions will take: their blocks, and the file system's records of them. */
export function bytesNeeded(survey: Pick<Survey, 'needed' | 'pieces'>, filesystem: Filesystem): number {
  if (survey.needed === 0) return 0;
  const { blockSize, type, abilities } = filesystem;
  // The image's last block may be counted in part only.
  const data = Math.ceil(survey.needed / blockSize) * blockSize;
  const mapped = type === 'ext4' && !abilities.fallocate;
  const records = mapped ? (data / blockSize) * POINTER_BYTES : survey.pieces * RECORD_BYTES;
  return data + Math.ceil(records / blockSize) * blockSize;
}

/** Bytes to keep free of a file system. Throws USAGE or RANGE for what is no amount of space. */
export function keepFreeBytes(keepFree: AllocationRequest['keepFree'], space = NO_SPACE): number {
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

/** Bytes; all Infinity where nothing is to be kept free. */
export interface Room {
  /** What may still be allocated. */
  bytes: number;
  available: number;
  keepFree: number;
}

export const ENDLESS_ROOM: Room = { bytes: Infinity, available: Infinity, keepFree: 0 };

/** btrfs writes its records of extents later, and takes them from the same space. */
const LATE_RECORDS = 16 * 2 ** 20;

/**
 * Watches the space to keep free while a run goes on. btrfs tells what is free as of its last
 * commit: there what the run has allocated since is subtracted, and only when that would stop it,
 * the file system is synced to know better.
 */
export class SpaceWatch {
  private known: { available: number; allocated: number } | undefined;

  constructor(
    private readonly storage: Storage,
    private readonly keepFree: number,
  ) {}

  /** `allocated` is what the run has allocated so far; all in bytes. */
  async room(wanted: number, allocated: number): Promise<Room> {
    let available = await this.available(allocated);
    if (this.lags() && available - this.keepFree - LATE_RECORDS < wanted) {
      await this.storage.file.use((fd) => native().syncFile(fd, SYNC_FILESYSTEM));
      this.known = undefined;
      available = await this.available(allocated);
    }
    const margin = this.lags() ? LATE_RECORDS : 0;
    return { bytes: available - this.keepFree - margin, available, keepFree: this.keepFree };
  }

  private lags(): boolean {
    return this.storage.filesystem.type === 'btrfs';
  }

  private async available(allocated: number): Promise<number> {
    const { available } = await spaceOf(this.storage);
    if (!this.lags()) return available;
    this.known ??= { available, allocated };
    return Math.min(available, this.known.available - (allocated - this.known.allocated));
  }
}
