/** How QEMU's jobs are at one moment. */
import type { ThickenError } from '../errors.js';
import type { QmpClient } from './client.js';
import type { IoStatus, JobStatus } from './commands.js';
import { jobErrors, qmpErrors, type JobPlace } from './errors.js';
import { isObject } from './message.js';

export interface JobSample {
  id: string;
  type: string;
  status: JobStatus;
  /** Bytes for block jobs. */
  position: number;
  total: number;
  /** Most bytes a second; 0 for no limit; null where the job is no block job. */
  speed: number | null;
  ioStatus: IoStatus;
  /** Whether it is asked to pause; it may not be there yet. */
  paused: boolean;
  error: string | null;
}

/** QEMU's status, with what made it pause. */
export type JobState = JobStatus | 'paused-by-error';

export function isPaused({ status, paused }: JobSample): boolean {
  return paused || status === 'paused' || status === 'standby';
}

/** After an error with `on-error` stop (or enospc) QEMU pauses the job, and says nothing else about it. */
export function stateOf(sample: JobSample): JobState {
  const stopped = sample.status === 'paused' || sample.status === 'standby';
  return stopped && sample.ioStatus !== 'ok' ? 'paused-by-error' : sample.status;
}

/**
 * All jobs. `query-block-jobs` knows more of block jobs, and in one piece; `query-jobs` knows all
 * kinds. Throws QMP_PROTOCOL where a reply is not of the shape that it must have.
 */
export async function sampleJobs(client: QmpClient): Promise<JobSample[]> {
  const [jobs, blockJobs] = await Promise.all([
    client.execute('query-jobs'),
    client.execute('query-block-jobs'),
  ]);
  const blocks = new Map(rows(client, blockJobs, 'device').map((row) => [row['device'], row]));
  return rows(client, jobs, 'id').map((row) => merge(row, blocks.get(row['id'])));
}

type Row = Record<string, unknown>;

function rows(client: QmpClient, reply: unknown, key: string): Row[] {
  const sound = (row: unknown) =>
    isObject(row) && typeof row[key] === 'string' && typeof row['status'] === 'string';
  if (Array.isArray(reply) && reply.every(sound)) return reply as Row[];
  throw qmpErrors.protocol(client.name, 'a list of jobs that is none');
}

const number = (value: unknown) => (typeof value === 'number' ? value : 0);
const text = (value: unknown) => (typeof value === 'string' ? value : null);

function merge(job: Row, block: Row | undefined): JobSample {
  return {
    id: text(job['id']) ?? '',
    type: text(job['type']) ?? 'unknown',
    status: (block ?? job)['status'] as JobStatus,
    position: number(block ? block['offset'] : job['current-progress']),
    total: number(block ? block['len'] : job['total-progress']),
    speed: block ? number(block['speed']) : null,
    ioStatus: (text(block?.['io-status']) ?? 'ok') as IoStatus,
    paused: block?.['paused'] === true,
    error: text((block ?? job)['error']),
  };
}

export type JobOutcome = { position: number; total: number } & (
  | { status: 'completed' }
  | { status: 'cancelled' }
  | { status: 'failed'; error: ThickenError }
);

/** QEMU passes the C library's words on, and nothing else. */
const CODES: Record<string, string> = {
  'No space left on device': 'ENOSPC',
  'Disk quota exceeded': 'EDQUOT',
  'Input/output error': 'EIO',
};
const CANCELLED = 'Operation canceled';

/** How a job ended, in QEMU's words; null: well. */
export interface Ending {
  error: string | null;
  position: number;
  total: number;
}

export function outcomeOf(place: JobPlace, { error, position, total }: Ending): JobOutcome {
  if (error === null) return { status: 'completed', position, total };
  if (error === CANCELLED) return { status: 'cancelled', position, total };
  const code = CODES[error] ?? 'JOB_FAILED';
  return { status: 'failed', position, total, error: jobErrors.failed(place, code, error) };
}
