/** What a request takes, by the image's own tables. */
import type { ThickenError } from '../errors.js';
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
}

/** What a request takes, or why the image is refused. */
export interface Needs {
  needs: Qcow2Needs;
  refusal: ThickenError | null;
}

/** Reads all of the tables. The session can go on to allocate where nothing is refused. */
export async function prepareNeeds(
  session: Qcow2Session,
  files: Qcow2Files,
  { range, level, backingEnd = ALL_BACKED }: NeedsRequest,
  cancel?: CancelFlag,
): Promise<Needs> {
  // `full` takes the same clusters and blocks: zeros are written to them afterwards, several at a time.
  const reached = level === 'full' ? 'falloc' : level;
  const request = { ...range, level: QCOW2_LEVELS.indexOf(reached), backingEnd };
  const needs = await withFiles(files, (opened) => native().prepareQcow2(session, opened, request, cancel));
  return { needs, refusal: refusalOf(needs, files.file.file.path) };
}

/** The same, for nobody who wants to allocate. */
export async function findNeeds(files: Qcow2Files, request: NeedsRequest): Promise<Needs> {
  const session = new (native().Qcow2Session)();
  try {
    return await prepareNeeds(session, files, request);
  } finally {
    session.close();
  }
}

/** Bytes that the container takes when it holds all that a level asks for. */
export function wholeSize({ counted, freed, data, tables, refcounts, reserve }: Qcow2Needs): number {
  return counted - freed + data + tables + refcounts + reserve;
}
