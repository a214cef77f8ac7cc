import { NO_WORK, type Work } from '../native.js';
import { diskErrors } from '../qemu/errors.js';
import { widen } from '../range.js';
import type { ByteRange } from '../types.js';
import { allOf } from '../outcomes.js';
import { flush, type GuestContext } from './populate.js';
import type { Mechanism, RouteSession } from './route.js';

const MIB = 2 ** 20;
/** Bytes on each side of a border; what the formats count in. */
const SECTOR = 512;
const ZEROS = Buffer.alloc(2 * SECTOR);

interface Touch {
  spot: ByteRange;
  /** Bytes of the clusters that it touches. */
  covers: number;
}

/**
 * Zeros written as data make QEMU map the cluster that they lie in; zeros by WRITE_ZEROES do not
 * (QEMU 7.2). One write over the border of two maps both: that is all that is written, and QEMU fills
 * the rest of a cluster with what it read as before.
 */
class TouchSession implements RouteSession {
  constructor(protected readonly context: GuestContext) {}

  run(ranges: Float64Array): Promise<Work> {
    const touches = [...touchesOf(ranges, this.context.granularity)];
    return allOf(touches.map((touch) => this.touch(touch)));
  }

  /** What is not zero is mapped, whatever the map said. */
  private async touch({ spot, covers }: Touch): Promise<Work> {
    const { nbd } = this.context;
    const zeros = ZEROS.subarray(0, spot.length);
    const now = await nbd.read(spot.offset, spot.length);
    if (!now.equals(zeros)) return { ...NO_WORK, skipped: covers, requests: 1 };
    await nbd.write(spot.offset, zeros);
    return { ...NO_WORK, allocated: covers, requests: 2 };
  }

  /** QEMU holds changes of its tables in memory until it is told to flush. */
  sync(): Promise<void> {
    return flush(this.context);
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}

/**
 * For an image that lies on others. QEMU fills a cluster that is marked as zeros from what lies below
 * when a part of it is written (QED, 7.2): there a touch would bring old data back. So each is written
 * whole, with what was read of it, in one request.
 */
class RewriteSession extends TouchSession {
  override run(ranges: Float64Array): Promise<Work> {
    return allOf([...clustersOf(ranges, this.context.granularity)].map((part) => this.rewrite(part)));
  }

  private async rewrite({ offset, length }: ByteRange): Promise<Work> {
    const { nbd, granularity } = this.context;
    const whole = widen({ offset, length }, granularity, nbd.size);
    const data = await nbd.read(whole.offset, whole.length);
    await nbd.write(whole.offset, data);
    return { ...NO_WORK, allocated: length, requests: 2 };
  }
}

/** `ranges`, cut at the borders of clusters. */
function* clustersOf(ranges: ArrayLike<number>, cluster: number): Generator<ByteRange> {
  for (let i = 0; i < ranges.length; i += 2) {
    const end = ranges[i]! + ranges[i + 1]!;
    for (let at = ranges[i]!; at < end;) {
      const next = Math.min(end, at - (at % cluster) + cluster);
      yield { offset: at, length: next - at };
      at = next;
    }
  }
}

/** `ranges` are of whole clusters, but for the image's end. */
export function* touchesOf(ranges: ArrayLike<number>, cluster: number): Generator<Touch> {
  for (let i = 0; i < ranges.length; i += 2) {
    const end = ranges[i]! + ranges[i + 1]!;
    for (let at = ranges[i]!; at < end;) {
      const border = at - (at % cluster) + cluster;
      const next = Math.min(end, border < end ? border + cluster : border);
      yield { spot: spotOf(at, border, next), covers: next - at };
      at = next;
    }
  }
}

function spotOf(at: number, border: number, end: number): ByteRange {
  if (border >= end) return { offset: at, length: Math.min(SECTOR, end - at) };
  const offset = Math.max(at, border - SECTOR);
  return { offset, length: Math.min(end, border + SECTOR) - offset };
}

const CUT = {
  name: 'nbd-write',
  chunk: { bytes: 16 * MIB, ranges: 64 },
  most: { bytes: 16 * MIB, ranges: 64 },
  depth: 4,
  adapts: 'no',
} as const;

export const nbdTouchRoute: Mechanism<GuestContext> = {
  ...CUT,
  open: (context) => Promise.resolve(new TouchSession(context)),
};

export const nbdRewriteRoute: Mechanism<GuestContext> = {
  ...CUT,
  // eslint-disable-next-line @typescript-eslint/require-await -- the interface is asynchronous
  async open(context) {
    const { granularity, nbd } = context;
    const { maximum } = nbd.blockSize;
    if (granularity <= maximum) return new RewriteSession(context);
    throw diskErrors.cannotThicken(nbd.path, `an image over others with clusters of more than ${maximum} bytes`);
  },
};
