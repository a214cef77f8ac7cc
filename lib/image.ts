/** An opened target: what it is, and what can be asked of it. */
import { errors, usageError } from './errors.js';
import type { Extent } from './extent.js';
import { ExtentIterator, extentsOf } from './extent-iterator.js';
import { doubtOf, planFor, planRequestOf, type JobImage } from './job-image.js';
import { Job } from './job.js';
import type { ExtentMethod } from './native.js';
import type { Plan, Survey } from './plan.js';
import { resolveRange } from './range.js';
import type {
  AllocationRequest,
  AllocationResult,
  DetachedResult,
  ImageInfo,
  MapEntry,
  Preallocation,
  Verdict,
} from './types.js';

export abstract class Image implements AsyncDisposable {
  /** The file; of a guest's disk, its name. */
  abstract readonly path: string;
  abstract readonly kind: ImageInfo['kind'];
  abstract readonly format: string;
  abstract readonly formatBy: ImageInfo['formatBy'];
  /** Bytes that the guest sees; of the container where its format can't be dealt with. */
  abstract readonly size: number;
  /** Bytes: the unit in which storage is given. */
  abstract readonly granularity: number;

  /** What is to be said of how it was opened, for people: a part of the warnings. */
  protected readonly remarks: string[] = [];
  private readonly jobs = new Set<Job>();
  private closing: Promise<void> | undefined;

  /** The image as a job needs it. */
  protected abstract forJob(): JobImage;
  /** Gives back what was opened, when no job is left. */
  protected abstract release(): Promise<void>;
  /** Format, sizes, what is allocated and missing, who uses the image, what its storage can do. */
  abstract info(): Promise<ImageInfo>;

  /** What a job and `info` name it by. */
  protected get named(): Pick<JobImage, 'path' | 'format' | 'size' | 'granularity'> {
    const { path, format, size, granularity } = this;
    return { path, format, size, granularity };
  }

  /** What `info` tells, with null for what is not said to be known. */
  protected infoWith(told: Partial<ImageInfo>): ImageInfo {
    return {
      target: this.path,
      kind: this.kind,
      format: this.format,
      formatBy: this.formatBy,
      virtualSize: this.size,
      fileSize: null,
      hostAllocated: null,
      allocated: null,
      missing: null,
      needed: { metadata: null, falloc: null, full: null },
      granularity: this.granularity,
      inUse: null,
      filesystem: null,
      backing: [],
      snapshots: 0,
      warnings: [],
      ...told,
    };
  }

  /**
   * Extents of a range in ascending order, without a gap and holes included: what storage is behind
   * each part. Bytes; the whole image by default. Throws RANGE, or the errno's name of a failed
   * call. The method is FIEMAP (Linux, Documentation/filesystems/fiemap.rst); on tmpfs lseek(2)
   * with SEEK_HOLE, and cachestat(2) for the holes (Linux 6.5); else SEEK_HOLE alone, which can't
   * tell reserved from missing.
   */
  extents(range: { offset?: number; length?: number } = {}): AsyncIterableIterator<Extent> {
    return new ExtentIterator(this.extentPages(range));
  }

  /** The same as {@link extents}, in typed arrays of some thousand entries: for millions of them. */
  async *extentPages(range: { offset?: number; length?: number } = {}) {
    yield* this.forJob().source.pages(resolveRange(range, this.size, this.path));
  }

  /** How the extents are read; null for a device that has none. */
  get extentMethod(): ExtentMethod | null {
    return this.forJob().source.method;
  }

  /** What {@link allocate} would do; changes nothing. Throws as `allocate` rejects. */
  async plan(request: AllocationRequest = {}): Promise<Plan> {
    return (await this.feasible(request)).plan;
  }

  /** What {@link allocate} would return, with `after` and `verified` null; changes nothing. */
  async dryRun(request: AllocationRequest = {}): Promise<AllocationResult> {
    const began = performance.now();
    const { image, plan, scope, level } = await this.feasible(request);
    return {
      target: this.path,
      format: this.format,
      preallocation: level,
      ...scope,
      plan: plan.steps,
      before: { allocated: image.exact ? plan.survey.met : null },
      after: null,
      allocated: 0,
      skipped: plan.survey.met,
      seconds: Math.round(performance.now() - began) / 1000,
      verified: null,
      guarantee: false,
      warnings: image.warnings,
    };
  }

  private async planned(request: AllocationRequest) {
    this.throwIfClosed();
    const image = this.forJob();
    await image.check(request);
    const { scope, ...planned } = planRequestOf(image, request);
    const plan = await planFor(image, planned);
    return { image, plan, scope, level: planned.level };
  }

  private async feasible(request: AllocationRequest) {
    const planned = await this.planned(request);
    await planned.image.refuse?.(planned.plan);
    return planned;
  }

  /**
   * Starts to give storage to what lacks it in a range; see {@link Job}. Data stays as it is.
   * `signal` cancels.
   */
  allocate(request: AllocationRequest & { signal?: AbortSignal } = {}): Job {
    this.throwIfClosed();
    const { signal, ...plain } = request;
    const job = new Job(this.forJob(), plain, signal);
    this.jobs.add(job);
    void job.result.catch(() => undefined).finally(() => this.jobs.delete(job));
    return job;
  }

  /**
   * Leaves a stream of the whole disk to QEMU, which drops the backing file at its end; tells the
   * job, and what it has to do. Throws USAGE but for a guest's disk with a backing file.
   */
  detach(_request: AllocationRequest = {}): Promise<DetachedResult> {
    return Promise.reject(usageError('only a disk of a guest can be streamed', 'name it by --qmp and --device'));
  }

  /** Whether every byte of a range has the storage that a level promises. */
  async verify(
    request: { offset?: number; length?: number; preallocation?: Preallocation } = {},
  ): Promise<Verdict> {
    const { image, plan, level } = await this.planned(request);
    const { missing, missingRanges, exact, unreserved } = plan.survey;
    const warnings = [...image.warnings];
    const doubt = doubtOf(image, level);
    if (doubt !== null) warnings.push(`no guarantee: ${doubt}`);
    if (!exact) warnings.push('there are too many missing ranges to list: neighbours are merged');
    return {
      target: this.path,
      preallocation: level,
      satisfied: missing === 0 && unreserved === 0 && image.exact && doubt === null,
      missing: missingRanges,
      warnings,
    };
  }

  /** Entries as `qemu-img map` gives them, with the host's state. */
  async *map(range: { offset?: number; length?: number } = {}): AsyncGenerator<MapEntry> {
    for await (const entries of this.mapPages(range)) yield* entries;
  }

  /** The same, some thousands at a time: for millions of them. */
  async *mapPages(range: { offset?: number; length?: number } = {}): AsyncGenerator<MapEntry[]> {
    const entryOf = await this.mapEntries();
    for await (const page of this.mapExtents(range)) {
      yield Array.from(extentsOf(page), (extent) => this.withFile(entryOf(extent)));
    }
  }

  /** What {@link map} tells of. */
  protected mapExtents(range: { offset?: number; length?: number }) {
    return this.extentPages(range);
  }

  private withFile(entry: MapEntry): MapEntry {
    if (entry.depth === 0 || !entry.present) return entry;
    const file = this.fileAt(entry.depth);
    return file === undefined ? entry : { ...entry, file };
  }

  /** The file or server of a layer below, where it is known. */
  protected fileAt(_depth: number): string | undefined {
    return undefined;
  }

  /** How an extent is told by {@link map}. */
  protected mapEntries(): Promise<(extent: Extent) => MapEntry> {
    const placed = this.kind !== 'qemu';
    return Promise.resolve((extent) => entryAt(extent, placed ? extent.offset : extent.at));
  }

  /** What can't be told or promised of this image, for people. */
  get warnings(): string[] {
    return this.forJob().warnings;
  }

  /** Whether anything that is copied is encrypted. */
  protected get needsKey(): boolean {
    return false;
  }

  /** Says so where a key was given that is of no use. */
  noteKey(): void {
    if (!this.needsKey) this.remarks.push('the key that was given is not used: nothing encrypted is copied here');
  }

  /** Cancels the jobs, waits for what is in flight, and closes. Safe to call again. */
  close(): Promise<void> {
    this.closing ??= this.end();
    return this.closing;
  }

  private async end(): Promise<void> {
    for (const job of this.jobs) job.cancel();
    await Promise.allSettled([...this.jobs].map((job) => job.result));
    await this.release();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  protected throwIfClosed(): void {
    if (this.closing) throw errors.closed(this.path);
  }
}

/** What a scan tells `info` of storage that has no tables: both levels take the same. */
export function rawStorage({ met, missing, needed }: Survey): Pick<ImageInfo, 'allocated' | 'missing' | 'needed'> {
  return { allocated: met, missing, needed: { metadata: null, falloc: needed, full: needed } };
}

/** `at`: where the extent lies in the file, in bytes. Literal objects: there may be millions of them. */
export function entryAt(extent: Extent, at: number | undefined, zero = extent.zero): MapEntry {
  const { offset: start, length, depth, present, data, host } = extent;
  return at === undefined
    ? { start, length, depth, present, zero, data, host }
    : { start, length, depth, present, zero, data, offset: at, host };
}
