/** The files of a qcow2 image, held alone: the container, and the external data file beside it. */
import type { FileHold, Writers } from '../file-hold.js';
import { workUndisturbed } from '../exclusive.js';
import type { Qcow2Writers, Work } from '../native.js';
import { holdFile } from '../routes/hold-file.js';
import type { Qcow2Files } from './tables.js';

export type AllocationWork = (
  ranges: Float64Array,
  writers: Qcow2Writers,
  dataWriters: Qcow2Writers | undefined,
) => Promise<Work>;

export class Qcow2Hold implements AsyncDisposable {
  private constructor(
    private readonly files: Qcow2Files,
    readonly file: FileHold,
    readonly data: FileHold | null,
  ) {}

  /** Throws IN_USE, EACCES, EPERM or EROFS. */
  static async take(files: Qcow2Files, trusted: boolean): Promise<Qcow2Hold> {
    const options = { trusted, guarded: true };
    const file = await holdFile(files.file.file, files.file.filesystem, options);
    try {
      const data = files.data && (await holdFile(files.data.file, files.data.filesystem, options));
      return new Qcow2Hold(files, file, data);
    } catch (error) {
      await file[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Grows with each proof: what was read before may have been changed by whoever opened a file. */
  get proofs(): number {
    return this.file.proofs + (this.data?.proofs ?? 0);
  }

  /** Work on both files, redone where somebody opened one of them meanwhile. */
  run(ranges: Float64Array, work: AllocationWork): Promise<Work> {
    return workUndisturbed(
      this.files.file.file.path,
      ranges,
      (rest) => this.file.use((writers) => this.useData(writers, rest, work)),
      async () => {
        await Promise.all([this.file.renew(), this.data?.renew()]);
      },
    );
  }

  private useData(writers: Writers, ranges: Float64Array, work: AllocationWork): Promise<Work> {
    const { file, data } = this.files;
    const own = withAlignment(writers, file.filesystem.blockSize, file.filesystem.directAlignment);
    if (!this.data || !data) return work(ranges, own, undefined);
    const { blockSize, directAlignment } = data.filesystem;
    return this.data.use((other) => work(ranges, own, withAlignment(other, blockSize, directAlignment)));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.data?.[Symbol.asyncDispose]();
    await this.file[Symbol.asyncDispose]();
  }
}

function withAlignment(writers: Writers, ...units: number[]): Qcow2Writers {
  return { ...writers, directAlignment: Math.max(...units) };
}
