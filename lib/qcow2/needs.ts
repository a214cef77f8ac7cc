/** What a request takes, by the image's own tables. */
import { errors, type ThickenError } from '../errors.js';
import { native, QCOW2_LEVELS, type CancelFlag, type Qcow2Needs, type Qcow2Session } from '../native.js';
import type { ByteRange, Preallocation } from '../types.js';
import { refusalOf } from './errors.js';
import { withFiles, type Qcow2Files } from './tables.js';

/** Nothing is known of what lies below: every unallocated cluster may come from there. */
export const ALL_BACKED = Number.MAX_SAFE_INTEGER;
export const NONE_BACKED = 0;

export interface NeedsRequest {
  /** Bytes of the virtual disk. */
  range: ByteRange;
  level: Preallocation;
  /** Guest offset from which on nothing comes from a backing file. */
  backingEnd?: number;
  /** Bytes, in whole clusters, that a storage daemon copies into the image before. */
  copied?: number;
}

/** What a request takes, or why the image is refused. */
export interface Needs {
  needs: Qcow2Needs;
  refusal: ThickenError | null;
}

/** Reads all of the tables. The session can go on to allocate where nothing is refused. Throws CANCELLED. */
export async function prepareNeeds(
  session: Qcow2Session,
  files: Qcow2Files,
  { range, level, backingEnd = ALL_BACKED, copied = 0 }: NeedsRequest,
  cancel?: CancelFlag,
): Promise<Needs> {
  // `full` takes the same clusters and blocks: zeros are written to them afterwards, several at a time.
  const reached = level === 'full' ? 'falloc' : level;
  const zerosFollow = level === 'full';
  const request = { ...range, level: QCOW2_LEVELS.indexOf(reached), backingEnd, zerosFollow, copied };
  const needs = await withFiles(files, (opened) => native().prepareQcow2(session, opened, request, cancel));
  const { path } = files.file.file;
  if (needs.cancelled) throw errors.cancelled(path);
  return { needs: withShared(needs, files), refusal: refusalOf(needs, path) };
}

/** Blocks that are shared take a copy where they can be unshared. */
function withShared(needs: Qcow2Needs, { file, data }: Qcow2Files): Qcow2Needs {
  const { fileNeeds, dataNeeds, later, unreserved, sharedFile, sharedData, sharedTables } = needs;
  const inData = data?.filesystem.abilities.unshare ? sharedData : 0;
  const taken = { ...needs, dataNeeds: dataNeeds + inData };
  if (!file.filesystem.abilities.unshare) return taken;
  return {
    ...taken,
    fileNeeds: fileNeeds + sharedFile + sharedTables,
    later: later + sharedTables,
    unreserved: unreserved + sharedTables,
  };
}

/** The same, for nobody who wants to allocate. */
export async function findNeeds(files: Qcow2Files, request: NeedsRequest, cancel?: CancelFlag): Promise<Needs> {
  const session = new (native().Qcow2Session)();
  try {
    return await prepareNeeds(session, files, request, cancel);
  } finally {
    session.close();
  }
}

/** Bytes that the container takes when it holds all that a level asks for. */
export function wholeSize({ counted, freed, data, tables, refcounts, reserve }: Qcow2Needs): number {
  return counted - freed + data + tables + refcounts + reserve;
}
