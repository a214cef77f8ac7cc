import { errors } from '../errors.js';
import { NO_WORK, type Work } from '../native.js';
import type { NbdClient } from '../nbd/client.js';
import { piecesOf } from '../range.js';
import type { ByteRange } from '../types.js';
import { allOf } from '../outcomes.js';
import type { Mechanism, RouteRequest, RouteSession } from './route.js';

const MIB = 2 ** 20;

/** Bytes of one read and one write, where the server takes that much at a time. */
const PIECE = MIB;
const ZEROS = Buffer.alloc(PIECE);

/** An export of an NBD server, for routes that have the server change it. */
export interface ExportContext extends RouteRequest {
  path: string;
  nbd: NbdClient;
}

/** Whether the server can be told to allocate; else zeros are written as data, as `full` asks. */
export function tells({ level, nbd }: Pick<ExportContext, 'level' | 'nbd'>): boolean {
  return level !== 'full' && nbd.flags.writeZeroes;
}

/**
 * Reads each piece, and gives storage to what reads as zero: WRITE_ZEROES with NO_HOLE, or zeros as
 * data. Reads come first even where the map says zeros: servers keep maps that are older than the
 * data (nbdkit's cacheextents), and what is not zero must never be written.
 */
class NbdWriteSession implements RouteSession {
  private readonly telling: boolean;
  private readonly most: number;
  private readonly unit: number;

  constructor(private readonly context: ExportContext) {
    const { minimum, preferred, maximum } = context.nbd.blockSize;
    this.telling = tells(context);
    this.most = Math.min(maximum, PIECE);
    this.unit = preferred <= this.most ? preferred : minimum;
  }

  run(ranges: Float64Array): Promise<Work> {
    const { most, unit } = this;
    return allOf([...piecesOf(ranges, most, unit)].map((piece) => this.back(piece)));
  }

  private async back({ offset, length }: ByteRange): Promise<Work> {
    const data = await this.context.nbd.read(offset, length);
    let allocated = 0;
    let requests = 1;
    for (const run of zeroRuns(data, offset, this.unit)) {
      await this.give(run);
      allocated += run.length;
      requests++;
    }
    return { ...NO_WORK, allocated, skipped: length - allocated, requests };
  }

  private async give({ offset, length }: ByteRange): Promise<void> {
    const { nbd } = this.context;
    if (this.telling) await nbd.writeZeroes(offset, length, { noHole: true });
    else await nbd.write(offset, ZEROS.subarray(0, length));
  }

  /** A server without FLUSH has nothing to hold back (NBD protocol). */
  async sync(): Promise<void> {
    const { nbd } = this.context;
    if (nbd.flags.flush) await nbd.flush();
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}

/** The parts of `data`, which lies at `offset`, whose units are all zeros. */
export function* zeroRuns(data: Buffer, offset: number, unit: number): Generator<ByteRange> {
  const isZero = (start: number, end: number) =>
    ZEROS.compare(data, start, end, 0, end - start) === 0;
  if (isZero(0, data.length)) return void (yield { offset, length: data.length });
  let from = 0;
  for (let at = 0; at < data.length; ) {
    const next = Math.min(data.length, at + unit - ((offset + at) % unit));
    if (!isZero(at, next)) {
      if (at > from) yield { offset: offset + from, length: at - from };
      from = next;
    }
    at = next;
  }
  if (data.length > from) yield { offset: offset + from, length: data.length - from };
}

// eslint-disable-next-line @typescript-eslint/require-await -- the interface is asynchronous
async function open(context: ExportContext): Promise<RouteSession> {
  if (context.nbd.flags.readOnly) throw errors.readOnlyExport(context.path);
  if (!context.exclusive) throw errors.noLock(context.path);
  return new NbdWriteSession(context);
}

export const nbdWriteRoute: Mechanism<ExportContext> = {
  name: 'nbd-write',
  chunk: { bytes: PIECE, ranges: 64 },
  most: { bytes: PIECE, ranges: 64 },
  depth: 16,
  adapts: 'no',
  open,
};
