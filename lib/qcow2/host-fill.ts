/**
 * The host's side of clusters that are mapped: blocks of their own where another file shares them, and
 * zeros where they are not written. What an earlier run mapped is no different from what this one did.
 */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import { HOLE, hostOf, SHARED, UNWRITTEN } from '../extent.js';
import { FALLOCATE_UNSHARE, native, NO_WORK, type CancelFlag, type Work } from '../native.js';
import type { FileExtents } from '../extent-source.js';
import type { FileHold } from '../file-hold.js';
import { ZeroWriter } from '../routes/zero-writer.js';
import type { Preallocation } from '../types.js';
import { Qcow2Extents } from './extents.js';
import type { Qcow2Hold } from './hold.js';
import { Qcow2Reader, type Qcow2Files } from './tables.js';

const sizeOfFile = promisify(fstat);

export class HostFill {
  private readonly source: Qcow2Extents;
  private readonly writer: ZeroWriter;
  private size = 0;

  private constructor(
    private readonly reader: Qcow2Reader,
    files: Qcow2Files,
    /** Where guest clusters lie, and who holds it. */
    private readonly home: FileExtents,
    private readonly hold: FileHold,
    private readonly level: Preallocation,
  ) {
    this.source = new Qcow2Extents(reader, files);
    const { filesystem } = home;
    this.writer = new ZeroWriter(hold, { filesystem, granularity: filesystem.blockSize });
  }

  /** null where fallocate(2) brings all that the level asks for. */
  static async open(files: Qcow2Files, hold: Qcow2Hold, level: Preallocation): Promise<HostFill | null> {
    const home = files.data ?? files.file;
    const { fallocate, unshare } = home.filesystem.abilities;
    if (level !== 'full' && fallocate && !unshare) return null;
    const reader = await Qcow2Reader.open(files.file.file);
    return new HostFill(reader, files, home, hold.data ?? hold.file, level);
  }

  /** After the tables have changed, and before more is filled. */
  async refresh(): Promise<void> {
    await this.reader.refresh();
    const { size } = await this.home.file.use((fd) => sizeOfFile(fd));
    this.size = size;
  }

  async run(ranges: Float64Array, cancel: CancelFlag): Promise<Work> {
    const found = new Found(this.wanted());
    for (let i = 0; i < ranges.length; i += 2) {
      const end = ranges[i]! + ranges[i + 1]!;
      for (let at = ranges[i]!; at < end;) {
        const page = await this.source.page(at, end, cancel);
        if (page.next <= at) return { ...NO_WORK, cancelled: true };
        found.add(page);
        at = page.next;
      }
    }
    const unshared = await this.unshare(found.takeRanges('unshare'), cancel);
    const zeros = found.takeRanges('zero');
    const written = zeros.length === 0 ? NO_WORK : await this.writer.write(zeros, this.size, cancel);
    return this.summed(bytesOf(ranges), unshared, written);
  }

  private wanted(): (state: number) => Fill | null {
    const { unshare, fallocate } = this.home.filesystem.abilities;
    const zeroes = this.level === 'full' ? [HOLE, UNWRITTEN] : fallocate ? [] : [HOLE];
    return (state) => {
      const host = hostOf(state);
      if (host === SHARED) return unshare ? 'unshare' : null;
      return host !== null && zeroes.includes(host) ? 'zero' : null;
    };
  }

  private async unshare(ranges: Float64Array, cancel: CancelFlag): Promise<Work> {
    if (ranges.length === 0) return NO_WORK;
    return this.hold.use(({ bufferedFd }) =>
      native().fallocate(bufferedFd, FALLOCATE_UNSHARE, this.size, 1, ranges, cancel),
    );
  }

  private summed(bytes: number, unshared: Work, written: Work): Work {
    const cancelled = unshared.cancelled || written.cancelled;
    const skipped = Math.min(bytes, written.skipped);
    const done = cancelled ? Math.min(bytes, unshared.allocated + written.allocated) : bytes - skipped;
    return {
      allocated: done,
      skipped,
      requests: unshared.requests + written.requests,
      cancelled,
      disturbed: false,
    };
  }

  sync(): Promise<void> {
    return this.hold.sync();
  }

  close(): void {
    this.reader.close();
  }
}

type Fill = 'zero' | 'unshare';

interface Place {
  start: number;
  end: number;
}

/** Places in the file that are to be filled. */
class Found {
  private readonly places: Record<Fill, Place[]> = { zero: [], unshare: [] };

  constructor(private readonly wanted: (state: number) => Fill | null) {}

  add({ length, state, host }: { length: Float64Array; state: Uint8Array; host: Float64Array }): void {
    for (let i = 0; i < state.length; i++) {
      const fill = this.wanted(state[i]!);
      if (fill) this.places[fill].push({ start: host[i]!, end: host[i]! + length[i]! });
    }
  }

  /** Ascending and merged: guest clusters lie in the file in any order. */
  takeRanges(fill: Fill): Float64Array {
    const merged: Place[] = [];
    for (const place of this.places[fill].sort((a, b) => a.start - b.start)) {
      const last = merged.at(-1);
      if (last && place.start <= last.end) last.end = Math.max(last.end, place.end);
      else merged.push(place);
    }
    return Float64Array.from(merged.flatMap(({ start, end }) => [start, end - start]));
  }
}

function bytesOf(ranges: Float64Array): number {
  let bytes = 0;
  for (let i = 1; i < ranges.length; i += 2) bytes += ranges[i]!;
  return bytes;
}
