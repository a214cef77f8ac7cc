/** The file of an image in a format that QEMU writes: what of it has no host blocks, or is not written. */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from '../descriptor.js';
import { HOLE, SHARED, UNKNOWN, UNWRITTEN } from '../extent.js';
import { FileExtents, tellsReserved } from '../extent-source.js';
import { readFilesystem, type Filesystem } from '../filesystem.js';
import type { CancelFlag } from '../native.js';
import type { PassRequest } from '../pass.js';
import { FILE_ROUTES } from '../routes/index.js';
import { routeOf, type RouteRequest } from '../routes/route.js';
import type { ByteRange, Preallocation } from '../types.js';

const statOf = promisify(fstat);

export class StoredFile {
  private constructor(
    readonly file: Descriptor,
    readonly filesystem: Filesystem,
    private readonly extents: FileExtents,
  ) {}

  static async open(file: Descriptor): Promise<StoredFile> {
    const filesystem = await readFilesystem(file);
    return new StoredFile(file, filesystem, new FileExtents(file, filesystem));
  }

  /** Whether what is reserved can be told from what is missing. */
  get tells(): boolean {
    return tellsReserved(this.extents);
  }

  /** Bytes of the file, as it is now, that lack what a level asks for. */
  async missing(level: Preallocation): Promise<number> {
    const lacks = lacksFor(level);
    let missing = 0;
    for await (const { length, state } of this.extents.pages(await this.whole())) {
      state.forEach((of, i) => (missing += lacks(of) ? length[i]! : 0));
    }
    return missing;
  }

  /**
   * How the whole file is filled; it must not grow meanwhile. `before`: ends what of ours has it open,
   * for a route that takes locks.
   */
  async pass(
    name: 'fallocate' | 'zero-write',
    request: RouteRequest,
    before: () => Promise<void>,
  ): Promise<Partial<PassRequest>> {
    const { file: image, filesystem, extents: source } = this;
    const granularity = filesystem.blockSize;
    const range = await this.whole();
    const context = { ...request, image, size: range.length, filesystem, granularity };
    const route = routeOf(FILE_ROUTES[name], context);
    const open = async (cancel: CancelFlag) => {
      await before();
      return route.open(cancel);
    };
    return { route: { ...route, open }, source, granularity, range, takes: lacksFor(request.level), known: null };
  }

  /** Bytes: of the file, and of its host blocks. */
  async sizes(): Promise<{ size: number; blocks: number }> {
    const { size, blocks } = await this.file.use((fd) => statOf(fd));
    return { size, blocks: blocks * 512 };
  }

  private async whole(): Promise<ByteRange> {
    return { offset: 0, length: (await this.sizes()).size };
  }
}

/** What is shared with another file is for nothing here to unshare. */
function lacksFor(level: Preallocation): (state: number) => boolean {
  const lacking = level === 'full' ? [HOLE, UNKNOWN, UNWRITTEN] : [HOLE, UNKNOWN];
  return (state) => state !== SHARED && lacking.includes(state);
}
