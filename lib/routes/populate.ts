import { ALLOCATION_DEPTH, type NbdClient } from '../nbd/client.js';
import { statusPages } from '../nbd/status-stream.js';
import { NO_WORK, type CancelFlag, type Work } from '../native.js';
import { diskErrors } from '../qemu/errors.js';
import { explainLoss } from '../qemu/node-export.js';
import type { QmpClient } from '../qmp/client.js';
import { piecesOf, widen } from '../range.js';
import type { ByteRange } from '../types.js';
import { withPartial } from '../outcomes.js';
import type { Mechanism, RouteRequest, RouteSession } from './route.js';
import { ZeroParts } from './zero-parts.js';

const MIB = 2 ** 20;

/** What `qemu:allocation-depth` says of what the image itself has. */
const OWN_DEPTH = 1;

/** A disk that a QEMU has open, for routes that have QEMU change it. */
export interface GuestContext extends RouteRequest {
  client: QmpClient;
  /** The node of the image format. */
  node: string;
  /** An export of that node. */
  nbd: NbdClient;
  /** Bytes of a cluster. */
  granularity: number;
  /** Whether zeros are told from content by a look before the copy: beside a guest that is not done. */
  keepsZeros?: boolean;
}

/**
 * NBD's CACHE makes QEMU copy a range from the backing chain into the image, ordered against the
 * guest's writes; no data crosses the socket. A READ instead would pass over zeros (QEMU 7.2).
 */
class PopulateSession implements RouteSession {
  private readonly zeroParts: ZeroParts | null;

  constructor(private readonly context: GuestContext) {
    const { nbd, granularity, range, keepsZeros } = context;
    this.zeroParts = keepsZeros ? new ZeroParts(nbd, granularity, range) : null;
  }

  async run(ranges: Float64Array, _cancel: CancelFlag): Promise<Work> {
    const requests: Promise<number>[] = [];
    for (let i = 0; i < ranges.length; i += 2) requests.push(this.cache(ranges[i]!, ranges[i + 1]!));
    const outcomes = await Promise.allSettled(requests);
    const done = outcomes.map((outcome) => (outcome.status === 'fulfilled' ? outcome.value : 0));
    const allocated = done.reduce((sum, bytes) => sum + bytes, 0);
    const work = { ...NO_WORK, allocated, requests: requests.length };
    const failed = outcomes.find((outcome) => outcome.status === 'rejected');
    if (failed) throw withPartial(await explainLoss(this.context.client, failed.reason), work);
    return work;
  }

  /**
   * Whole clusters: a copy that began at a subcluster within one, those before it having another
   * state, ended QEMU by an assertion (7.2, bdrv_co_do_copy_on_readv).
   */
  private async cache(offset: number, length: number): Promise<number> {
    const { nbd, granularity } = this.context;
    const whole = widen({ offset, length }, granularity, nbd.size);
    const parts = this.zeroParts ? await this.zeroParts.partsOf(whole) : [whole];
    await allEnded(parts.map((part) => this.copy(part)));
    return length;
  }

  /** As much at a time as QEMU takes, which is no more than the server of a layer below does. */
  private async copy({ offset, length }: ByteRange): Promise<void> {
    const { nbd, granularity } = this.context;
    const { maximum } = nbd.blockSize;
    const isWhole = granularity <= maximum;
    const pieces = [...piecesOf([offset, length], isWhole ? maximum : granularity, granularity)];
    await allEnded(pieces.map((piece) => (isWhole ? nbd.cache(piece.offset, piece.length) : this.copyCluster(piece))));
  }

  /**
   * QEMU copies a cluster that is larger than a request as a whole. But where it has the first subclusters
   * already, it looks for no more, and a request that began behind them would end it (7.2).
   */
  private async copyCluster({ offset, length }: ByteRange): Promise<void> {
    const { nbd } = this.context;
    const { maximum } = nbd.blockSize;
    await nbd.cache(offset, Math.min(maximum, length));
    if (await isOwn(nbd, { offset, length })) return;
    throw diskErrors.smallRequests(maximum);
  }

  /** QEMU holds changes of its tables in memory until it is told to flush. */
  sync(): Promise<void> {
    return flush(this.context);
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}

/** Rejects with the first failure, when none is under way any more. */
async function allEnded(requests: readonly Promise<void>[]): Promise<void> {
  const outcomes = await Promise.allSettled(requests);
  const failed = outcomes.find((outcome) => outcome.status === 'rejected');
  if (failed) throw failed.reason;
}

/** Whether the image itself has all of a range. */
async function isOwn(nbd: NbdClient, range: ByteRange): Promise<boolean> {
  for await (const { flags } of statusPages(nbd, range, { contexts: [ALLOCATION_DEPTH], lanes: 1 })) {
    if (flags[0]!.some((depth) => depth !== OWN_DEPTH)) return false;
  }
  return true;
}

export async function flush({ client, nbd }: GuestContext): Promise<void> {
  await nbd.flush().catch(async (error: unknown) => {
    throw await explainLoss(client, error);
  });
}

/** Chunks start small: one of 32 MiB over a slow template held a guest’s write up for 5 s. */
export const populateRoute: Mechanism<GuestContext> = {
  name: 'populate',
  chunk: { bytes: MIB / 4, ranges: 16 },
  most: { bytes: 4 * MIB, ranges: 16 },
  depth: 16,
  adapts: 'window',
  open: (context) => Promise.resolve(new PopulateSession(context)),
};
