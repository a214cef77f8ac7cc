/** Host blocks held ready for what a guest may still write to its qcow2 image. */
import type { Descriptor } from '../descriptor.js';
import { HOLE, UNKNOWN } from '../extent.js';
import { FileExtents, tellsReserved } from '../extent-source.js';
import { readFilesystem, type Filesystem } from '../filesystem.js';
import { native } from '../native.js';
import type { ByteRange } from '../types.js';
import type { PassRequest } from '../pass.js';
import { FILE_ROUTES } from '../routes/index.js';
import { routeOf, type RouteRequest } from '../routes/route.js';

/** The tables are read while QEMU may be changing them. */
const TRIES = 5;

/** Zeroed by fallocate(2), blocks that are there are given back, and new ones taken (Linux 6.18). */
const REPLACING = new Set(['xfs', 'btrfs']);

export interface Reserve {
  range: ByteRange;
  /** Whether writes to parts of clusters may take blocks of the file system beside it. */
  zeroes: boolean;
}

/**
 * The container of a qcow2 image in use. What it may grow to is read from its tables; a snapshot
 * taken later can outgrow that, so that it is computed anew whenever it is asked for.
 */
export class HostReserve {
  private constructor(
    readonly file: Descriptor,
    readonly filesystem: Filesystem,
    private readonly extents: FileExtents,
  ) {}

  /** `file` is closed with the reserve, also where this fails. */
  static async open(file: Descriptor): Promise<HostReserve> {
    try {
      const filesystem = await readFilesystem(file);
      return new HostReserve(file, filesystem, new FileExtents(file, filesystem));
    } catch (error) {
      await file.close();
      throw error;
    }
  }

  /** Whether what is reserved can be told from what is missing. */
  get tells(): boolean {
    return tellsReserved(this.extents);
  }

  /**
   * From the first byte of the container to the last that it may grow to, when every cluster is
   * mapped, and each that a write must move (compressed, or shared with a snapshot) once more. null
   * where the tables can't be made out.
   */
  async find(): Promise<Reserve | null> {
    for (let i = 0; i < TRIES; i++) {
      const { code, fileEnd, reserve, marked, bare } = await this.file.use((fd) => native().measureQcow2(fd));
      if (code !== 'OK') continue;
      const zeroes = marked > 0 || (bare > 0 && REPLACING.has(this.filesystem.type));
      return { range: { offset: 0, length: fileEnd + reserve }, zeroes };
    }
    return null;
  }

  /** Bytes of the range that have no host blocks. */
  async missing(range: ByteRange): Promise<number> {
    let missing = 0;
    for await (const { length, state } of this.extents.pages(range)) {
      state.forEach((of, i) => (missing += isMissing(of) ? length[i]! : 0));
    }
    return missing;
  }

  /**
   * How to fill it: fallocate(2) that keeps the size, of which QEMU knows nothing. The file may grow
   * meanwhile.
   */
  pass(range: ByteRange, request: RouteRequest): Partial<PassRequest> {
    const { file: image, filesystem, extents: source } = this;
    const granularity = filesystem.blockSize;
    const context = { ...request, image, size: 0, filesystem, granularity };
    return { route: routeOf(FILE_ROUTES.fallocate, context), source, granularity, range, takes: isMissing };
  }

  close(): Promise<void> {
    return this.file.close();
  }
}

function isMissing(state: number): boolean {
  return state === HOLE || state === UNKNOWN;
}
