/** Where the extents of an image come from. */
import { readFile, stat } from 'node:fs/promises';
import { alignPages } from './align.js';
import { Descriptor, READ_ONLY } from './descriptor.js';
import { ThickenError } from './errors.js';
import { ABSENT, UNALLOCATED, UNKNOWN, type ExtentPage } from './extent.js';
import { EXTENT_METHODS, native, SYNC_DATA, type CancelFlag, type ExtentMethod } from './native.js';
import { readFilesystem, type Filesystem } from './filesystem.js';
import { widen } from './range.js';
import { PAGES_AHEAD, readAhead } from './read-ahead.js';
import type { ByteRange } from './types.js';
import { deviceName } from './users.js';

/** Large enough that the hop to the native thread does not count, small enough to stay in cache. */
const PAGE_EXTENTS = 4096;

export interface ExtentSource extends AsyncDisposable {
  /** How the extents are read; null where there are none to read. */
  readonly method: ExtentMethod | null;
  /** The file system under the extents; null where there is none. */
  readonly filesystem: Filesystem | null;
  /** The file that the extents belong to; null where there is none. */
  readonly file: Descriptor | null;
  /** Pages without a gap from the start of `range` to its end, or to where they were when it was cancelled. */
  pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined>;
}

/** SEEK_HOLE takes reserved extents for holes. */
export function tellsReserved(source: ExtentSource): boolean {
  return source.method !== null && source.method !== 'seek';
}

/** Extents of a regular file: by the best method that the file system answers. */
export class FileExtents implements ExtentSource {
  method: ExtentMethod;

  constructor(
    readonly file: Descriptor,
    readonly filesystem: Filesystem,
    private readonly asked?: ExtentMethod,
    /** Bytes into the file where the image starts. */
    private readonly shift = 0,
  ) {
    this.method = asked ?? firstMethod(filesystem);
  }

  pages(range: ByteRange, cancel?: CancelFlag) {
    return readAhead(range, PAGES_AHEAD, (offset, end) => this.read(offset, end, cancel));
  }

  private async read(offset: number, end: number, cancel?: CancelFlag) {
    const page = await this.readShifted(offset + this.shift, end + this.shift, cancel);
    if (this.shift !== 0) {
      page.next -= this.shift;
      page.offset.forEach((value, i) => (page.offset[i] = value - this.shift));
    }
    return page;
  }

  private async readShifted(offset: number, end: number, cancel?: CancelFlag) {
    const { method } = this;
    try {
      return await this.readBy(method, offset, end, cancel);
    } catch (error) {
      if (this.asked || method === 'seek' || !isLacking(error)) throw error;
      this.method = 'seek';
      this.filesystem.abilities.fiemap = false;
      return this.readBy('seek', offset, end, cancel);
    }
  }

  private readBy(method: ExtentMethod, offset: number, end: number, cancel?: CancelFlag) {
    const code = EXTENT_METHODS.indexOf(method);
    return this.file.use((fd) =>
      native().readExtents(fd, code, offset, end, PAGE_EXTENTS, cancel),
    );
  }

  /** The file belongs to whoever opened it. */
  async [Symbol.asyncDispose](): Promise<void> {}
}

/** tmpfs has no FIEMAP; what it has reserved shows in its page cache. */
function firstMethod({ type, abilities }: Filesystem): ExtentMethod {
  if (abilities.fiemap) return 'fiemap';
  return type === 'tmpfs' ? 'pages' : 'seek';
}

/** EPERM: only who may write to a file may ask what the page cache holds of it (Linux 6.12). */
const LACKING = new Set(['EOPNOTSUPP', 'ENOTTY', 'EINVAL', 'ENOSYS', 'EPERM']);

export function isLacking(error: unknown): boolean {
  return error instanceof ThickenError && LACKING.has(error.code);
}

/** Extents that somebody else tells: no file is read for them. */
export abstract class ToldExtents implements ExtentSource {
  readonly method = null;
  readonly filesystem = null;
  readonly file = null;

  abstract pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined>;

  /** What they are told by belongs to whoever opened it. */
  async [Symbol.asyncDispose](): Promise<void> {}
}

/** A block device tells nothing of what is behind it. */
export class UnknownExtents extends ToldExtents {
  // eslint-disable-next-line @typescript-eslint/require-await -- the interface is asynchronous
  async *pages(range: ByteRange): AsyncGenerator<ExtentPage, void, undefined> {
    if (range.length === 0) return;
    yield {
      offset: Float64Array.of(range.offset),
      length: Float64Array.of(range.length),
      state: Uint8Array.of(UNKNOWN),
      flags: Uint32Array.of(0),
    };
  }
}

interface DeviceGeometry {
  /** Bytes. */
  size: number;
  granularity: number;
}

/**
 * Extents of a loop device: those of the file behind it, where that can be found by the name that
 * sysfs gives, and is the same file (device and inode). What was written to the device is flushed
 * first, so that the file knows of it. They come in the device's units, wherever the file's blocks
 * begin: a device reads and allocates nothing smaller.
 */
export class LoopExtents implements ExtentSource {
  private constructor(
    private readonly device: Descriptor,
    private readonly behind: FileExtents,
    readonly file: Descriptor,
    private readonly geometry: DeviceGeometry,
  ) {}

  get method() {
    return this.behind.method;
  }

  get filesystem() {
    return this.behind.filesystem;
  }

  /** null where `device` is no loop device, or its file can't be read from here. */
  static async open(
    device: Descriptor,
    geometry: DeviceGeometry,
  ): Promise<LoopExtents | null> {
    const loop = await device.use((fd) => native().loopFacts(fd));
    if (!loop) return null;
    const file = await openBacking(device, loop).catch(() => null);
    if (!file) return null;
    try {
      const behind = new FileExtents(file, await readFilesystem(file), undefined, loop.offset);
      return new LoopExtents(device, behind, file, geometry);
    } catch (error) {
      await file.close();
      throw error;
    }
  }

  async *pages(range: ByteRange, cancel?: CancelFlag) {
    await this.device.use((fd) => native().syncFile(fd, SYNC_DATA));
    const { granularity, size } = this.geometry;
    const whole = widen(range, granularity, size);
    yield* alignPages(this.behind.pages(whole, cancel), granularity, range);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.file.close();
  }
}

async function openBacking(
  device: Descriptor,
  loop: { device: number; inode: number },
): Promise<Descriptor | null> {
  const { rdev } = await stat(device.path);
  const sysfs = `/sys/dev/block/${deviceName(rdev)}/loop/backing_file`;
  const path = (await readFile(sysfs, 'utf8')).replace(/\n$/, '');
  const facts = await stat(path);
  const same = facts.isFile() && facts.ino === loop.inode && facts.dev === loop.device;
  return same ? Descriptor.openSame(path, READ_ONLY, facts) : null;
}

/** Bytes of a range that each layer has the content of; the first is the image itself. */
export async function bytesByDepth(source: ExtentSource, range: ByteRange): Promise<number[]> {
  const bytes: number[] = [];
  for await (const { length, state, depth } of source.pages(range)) {
    length.forEach((amount, i) => {
      if (state[i] === ABSENT || state[i] === UNALLOCATED) return;
      const layer = depth?.[i] ?? 0;
      bytes[layer] = (bytes[layer] ?? 0) + amount;
    });
  }
  return bytes;
}
