/** Allocates a qcow2 image in place (DESIGN: the tables first, in an order that a crash can't harm). */
import type { Descriptor } from '../descriptor.js';
import { NO_WORK, type CancelFlag, type Work } from '../native.js';
import { Qcow2Allocation } from '../qcow2/allocation.js';
import { HostFill } from '../qcow2/host-fill.js';
import type { Qcow2Files } from '../qcow2/tables.js';
import type { ByteRange } from '../types.js';
import { partialOf, withPartial } from '../outcomes.js';
import type { Cut, Route, RouteRequest, RouteSession } from './route.js';
import { ZERO_CHUNK } from './zero-writer.js';

const MIB = 2 ** 20;
const GIB = 2 ** 30;

/** A qcow2 image at rest. */
export interface Qcow2Context extends RouteRequest {
  image: Descriptor;
  files: Qcow2Files;
  /** Bytes of the virtual disk, and of a cluster. */
  size: number;
  granularity: number;
}

/**
 * Where zeros are written anyway, tables are made for so much at a time: each time the disk has to
 * sync twice, which for every chunk would cost more than the tables do. No zeros are written ahead: the
 * throttle lets them through chunk by chunk.
 */
const AHEAD = 2 * GIB;

/** Where nothing is written but tables, a chunk is as large as its file system call may last. */
const TABLES_ONLY = cutOf({ bytes: 64 * GIB, ranges: 65_536 });
/** Without fallocate(2), clusters get their blocks by being written; what may hold old bytes gets zeros. */
const WRITTEN = cutOf({ bytes: 64 * MIB, ranges: 1024 });

function cutOf(chunk: Cut['chunk']) {
  return { chunk, most: chunk, depth: 1 };
}

class Qcow2Session implements RouteSession {
  /** One after the other: tables are changed by one call at a time, and only while no zeros are written. */
  private turn: Promise<unknown> = Promise.resolve();
  private readonly filling = new Set<Promise<unknown>>();
  /** Guest bytes that have been allocated by this session. */
  private done: ByteRange = { offset: 0, length: 0 };

  private constructor(
    private readonly context: Qcow2Context,
    private readonly allocation: Qcow2Allocation,
    /** null where the host needs nothing but what the allocation asks of it. */
    private readonly fill: HostFill | null,
  ) {}

  static async open(context: Qcow2Context, cancel: CancelFlag): Promise<Qcow2Session> {
    const { files, level, range, exclusive, keepFree } = context;
    const allocation = await Qcow2Allocation.open(files, { range, level, exclusive, keepFree }, cancel);
    try {
      const fill = level === 'metadata' ? null : await HostFill.open(files, allocation.hold, level);
      return new Qcow2Session(context, allocation, fill);
    } catch (error) {
      await allocation[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** By the tables as they are under the locks: what was copied into the image before has changed them. */
  get cut() {
    const { level, files } = this.context;
    if (level === 'full') return ZERO_CHUNK;
    const { fallocate } = files.file.filesystem.abilities;
    return fallocate && !this.allocation.writesZeros ? TABLES_ONLY : WRITTEN;
  }

  async run(ranges: Float64Array, cancel: CancelFlag): Promise<Work> {
    const { filled, allocated } = await this.inTurn(() => this.allocate(ranges, cancel)).catch((error: unknown) => {
      throw withPartial(error, { ...NO_WORK, allocated: this.reached(ranges, partialOf(error).allocated) });
    });
    if (allocated.cancelled) return { ...allocated, allocated: this.reached(ranges, allocated.allocated) };
    return (await filled) ?? { ...allocated, allocated: bytesOf(ranges), skipped: 0 };
  }

  /** What of `ranges` was done where `bytes` from its start on have been mapped: at `full`, zeros were to follow. */
  private reached(ranges: Float64Array, bytes: number): number {
    if (this.context.level === 'full') return 0;
    const end = ranges[0]! + bytes;
    let reached = 0;
    for (let i = 0; i < ranges.length; i += 2) {
      reached += Math.min(ranges[i + 1]!, Math.max(0, end - ranges[i]!));
    }
    return reached;
  }

  /** The zeros are begun in the same turn, so that the next one waits for them. */
  private async allocate(ranges: Float64Array, cancel: CancelFlag) {
    const span = spanOf(ranges);
    let allocated: Work = NO_WORK;
    if (!covers(this.done, span)) {
      await Promise.allSettled(this.filling);
      const ahead = this.aheadOf(span);
      allocated = await this.allocation.allocate(ahead, cancel);
      if (allocated.cancelled) return { allocated, filled: null };
      await this.fill?.refresh();
      this.done = ahead;
    }
    return { allocated, filled: this.fill && this.startFill(this.fill, ranges, cancel) };
  }

  private startFill(fill: HostFill, ranges: Float64Array, cancel: CancelFlag): Promise<Work> {
    const filled = fill.run(ranges, cancel);
    const settled = filled.catch(() => undefined).finally(() => this.filling.delete(settled));
    this.filling.add(settled);
    return filled;
  }

  private aheadOf({ offset, length }: ByteRange): ByteRange {
    const { level, range, keepsFree } = this.context;
    if (level !== 'full' || keepsFree || this.allocation.writesZeros) return { offset, length };
    return { offset, length: Math.min(range.offset + range.length - offset, Math.max(length, AHEAD)) };
  }

  private inTurn<T>(work: () => Promise<T>): Promise<T> {
    const next = this.turn.then(work);
    this.turn = next.catch(() => undefined);
    return next;
  }

  takesBeside(): Promise<number> {
    return this.context.level === 'metadata' ? Promise.resolve(0) : this.allocation.takesBeside();
  }

  async sync(cancel: CancelFlag): Promise<void> {
    await this.inTurn(async () => {
      await Promise.allSettled(this.filling);
      await this.fill?.sync();
      await this.allocation.finish(cancel);
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.turn;
    await Promise.allSettled(this.filling);
    this.fill?.close();
    await this.allocation[Symbol.asyncDispose]();
  }
}

export function qcow2Route(context: Qcow2Context): Route {
  return {
    name: 'qcow2',
    ...WRITTEN,
    adapts: 'no',
    open: (cancel) => Qcow2Session.open(context, cancel),
  };
}

function spanOf(ranges: Float64Array): ByteRange {
  const offset = ranges[0]!;
  return { offset, length: ranges[ranges.length - 2]! + ranges[ranges.length - 1]! - offset };
}

function covers(outer: ByteRange, inner: ByteRange): boolean {
  return inner.offset >= outer.offset && inner.offset + inner.length <= outer.offset + outer.length;
}

function bytesOf(ranges: Float64Array): number {
  let bytes = 0;
  for (let i = 1; i < ranges.length; i += 2) bytes += ranges[i]!;
  return bytes;
}
