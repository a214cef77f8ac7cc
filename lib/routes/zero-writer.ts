import type { FileHold } from '../file-hold.js';
import type { Filesystem } from '../filesystem.js';
import { isLacking } from '../extent-source.js';
import { FALLOCATE_RESERVE, native, type CancelFlag, type Work } from '../native.js';
import type { ByteRange } from '../types.js';
import { HOLES_PER_CALL } from './kernel-call.js';

const MIB = 2 ** 20;

/**
 * Shorter holes go through the page cache, which gathers them: thousands of direct writes of
 * 192 KiB took twice as long as buffered ones (ext4 and xfs, Linux 6.18).
 */
const DIRECT_MINIMUM = MIB;
/**
 * And these where blocks are reserved: a direct write into a hole holds the inode's lock alone, one
 * into reserved blocks shares it (ext4 since Linux 6.5, xfs). 6 GiB in holes of 192 KiB took 2.4 s
 * with the reserving, 4.6 s one by one into holes, and through the page cache 3.3 s where its memory
 * was at hand, 14 s where the host had to find it first.
 */
const RESERVED_MINIMUM = 64 * 2 ** 10;

/**
 * Dirty memory is bounded by this many chunks behind those in flight. To wait for each chunk's own
 * writeback instead leaves the disk idle while the next one is copied: it took 1.4 times as long.
 */
const UNSETTLED_CHUNKS = 4;
const NOTHING: ByteRange = { offset: 0, length: 0 };

/** How a pass that writes zeros is cut. */
export const ZERO_CHUNK = {
  chunk: { bytes: 8 * MIB, ranges: 1024 },
  most: { bytes: 8 * MIB, ranges: 1024 },
  depth: 4,
};

/** Writes zeros into what reads as zero, in a file that is held alone. */
export class ZeroWriter {
  /** Chunks that may not be on the disk yet. */
  private readonly written: ByteRange[] = [];
  private directMinimum = DIRECT_MINIMUM;

  constructor(
    private readonly hold: Pick<FileHold, 'run' | 'use'>,
    private readonly file: { filesystem: Filesystem; granularity: number },
  ) {}

  /** Reserves blocks for all that is about to be written. What lacks fallocate(2) is written without. */
  async reserve(ranges: Float64Array, size: number, cancel: CancelFlag): Promise<void> {
    try {
      await this.hold.use(({ bufferedFd }) =>
        native().fallocate(bufferedFd, FALLOCATE_RESERVE, size, HOLES_PER_CALL, ranges, cancel),
      );
      this.directMinimum = RESERVED_MINIMUM;
    } catch (error) {
      if (!isLacking(error)) throw error;
    }
  }

  /** `ranges` ascend; `size` is the file's, and stays so meanwhile. */
  async write(ranges: Float64Array, size: number, cancel: CancelFlag): Promise<Work> {
    const settle = this.written.length >= UNSETTLED_CHUNKS ? this.written.shift() : undefined;
    const work = await this.hold.run(ranges, (rest, writers) =>
      native().zeroWrite({ ...writers, ...this.options(size, settle) }, rest, cancel),
    );
    this.written.push(spanOf(ranges));
    return work;
  }

  private options(size: number, settle: ByteRange = NOTHING) {
    const { filesystem, granularity } = this.file;
    return {
      directAlignment: Math.max(granularity, filesystem.directAlignment),
      directMinimum: this.directMinimum,
      granularity: Math.min(granularity, MIB),
      expectedSize: size,
      settleOffset: settle.offset,
      settleLength: settle.length,
    };
  }
}

function spanOf(ranges: Float64Array): ByteRange {
  const offset = ranges[0]!;
  return { offset, length: ranges[ranges.length - 2]! + ranges[ranges.length - 1]! - offset };
}
