/** Whether the file systems of an image have room for what is taken from them. */
import { errors, type ThickenError } from '../errors.js';
import { factsOf } from '../exclusive.js';
import type { FileExtents } from '../extent-source.js';
import type { Qcow2Needs } from '../native.js';
import { keepFreeBytes, spaceOf, SpaceWatch } from '../space.js';
import type { AllocationRequest } from '../types.js';
import type { Qcow2Files } from './tables.js';

type KeepFree = AllocationRequest['keepFree'];

/**
 * Before the first change. A data file may lie on a file system of its own, or on the same. Throws ENOSPC
 * or EDQUOT, and KEEP_FREE for tables on a file system that no chunk of data is watched for.
 */
export async function compareSpace(
  files: Qcow2Files,
  { fileNeeds, dataNeeds }: Qcow2Needs,
  keepFree: KeepFree,
): Promise<void> {
  const { file, data } = files;
  const own = await refuseBeyond(file, fileNeeds);
  if (!data) return;
  const other = await refuseBeyond(data, dataNeeds);
  if (await onOneDevice(files)) {
    // A quota of either may be less than what both draw on.
    const most = own.available > other.available ? own : other;
    refuse(file, fileNeeds + dataNeeds, most);
    return;
  }
  const refusal = await keepsRoom(file, fileNeeds, keepFree);
  if (refusal) throw refusal;
}

async function refuseBeyond(extents: FileExtents, needed: number) {
  const space = await spaceOf(extents);
  refuse(extents, needed, space);
  return space;
}

function refuse({ file }: FileExtents, needed: number, space: { available: number; quota: boolean }): void {
  if (needed > space.available) throw errors.noSpace(file.path, needed, space.available, space.quota);
}

/** Whether the tables and what they map lie on one file system. */
export async function onOneDevice({ file, data }: Qcow2Files): Promise<boolean> {
  if (!data) return true;
  const [own, other] = await Promise.all([factsOf(file.file), factsOf(data.file)]);
  return own.dev === other.dev;
}

/** KEEP_FREE where `bytes` would leave less than is to be kept free; null where there is room. */
export async function keepsRoom(extents: FileExtents, bytes: number, keepFree: KeepFree): Promise<ThickenError | null> {
  if (bytes === 0 || keepFree === undefined) return null;
  const kept = keepFreeBytes(keepFree, await spaceOf(extents));
  if (kept === 0) return null;
  const { bytes: room, available } = await new SpaceWatch(extents, kept).room(bytes, 0);
  return bytes > room ? errors.keepFree(extents.file.path, kept, available) : null;
}
