/** An opened target, with its facts. */
import { fstat, read } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from './descriptor.js';
import { errors, rangeError } from './errors.js';
import { deviceUse, fileUse } from './exclusive.js';
import type { Extent } from './extent.js';
import { ExtentIterator } from './extent-iterator.js';
import { FileExtents, LoopExtents, UnknownExtents, type ExtentSource } from './extent-source.js';
import { readFilesystem } from './filesystem.js';
import { formatOf, PROBE_LENGTH, requireRaw, type Format } from './format.js';
import { Job, planFor, scopeOf, type JobImage } from './job.js';
import { FileLiveness } from './liveness.js';
import { native, type ExtentMethod } from './native.js';
import type { Plan } from './plan.js';
import { resolveRange, roundDown } from './range.js';
import { FILE_ROUTES } from './routes/index.js';
import { routeOf, type Mechanism, type RouteContext, type RouteRequest } from './routes/route.js';
import { spaceOf, type Storage } from './space.js';
import { openTarget, type Target } from './target.js';
import type {
  AllocationRequest,
  AllocationResult,
  ImageInfo,
  MapEntry,
  Preallocation,
  RouteName,
  Verdict,
} from './types.js';

const fstatFile = promisify(fstat);
const readFile = promisify(read);

/** Zero runs on a device are looked for in pages: the usual block of a file system on it. */
const DEVICE_UNIT = 4096;

export interface OpenOptions {
  /** The image's format, in QEMU's words; without it, it is probed with the caution of a stranger. */
  format?: string;
  /** How the extents of a file are read; the best that the file system answers if absent. */
  extentMethod?: ExtentMethod;
}

interface Geometry {
  /** Bytes. */
  size: number;
  granularity: number;
  /** Bytes at the end of a device that are no whole sector, and can't be read or written alone. */
  beyond: number;
}

/**
 * Opens an image file or a block device, for reading only: nothing is changed or locked before
 * `allocate`. Throws a ThickenError: the errno's name, EISDIR, UNSUPPORTED, USAGE, RANGE,
 * CHANGED.
 */
export async function open(target: string, options: OpenOptions = {}): Promise<Image> {
  const opened = await openTarget(target);
  try {
    return await describe(opened, options);
  } catch (error) {
    await opened.descriptor.close();
    throw error;
  }
}

async function describe(target: Target, options: OpenOptions): Promise<Image> {
  const { descriptor } = target;
  const head = Buffer.alloc(PROBE_LENGTH);
  const [{ size }, filesystem] = await Promise.all([
    descriptor.use((fd) => fstatFile(fd)),
    target.kind === 'file' ? readFilesystem(descriptor) : null,
    descriptor.use((fd) => readFile(fd, head, 0, PROBE_LENGTH, 0)),
  ]);
  const format = formatOf(descriptor.path, head, options.format);
  if (!filesystem) return describeDevice(target, format);
  checkSize(size, descriptor.path);
  const source = new FileExtents(descriptor, filesystem, options.extentMethod);
  const geometry = { size, granularity: filesystem.blockSize, beyond: 0 };
  return new Image(target, format, head, source, geometry);
}

async function describeDevice(target: Target, format: Format): Promise<Image> {
  const { descriptor } = target;
  const facts = await descriptor.use((fd) => native().deviceFacts(fd));
  checkSize(facts.size, descriptor.path);
  const size = roundDown(facts.size, facts.logicalSector);
  const granularity = Math.max(DEVICE_UNIT, facts.logicalSector);
  const geometry = { size, granularity, beyond: facts.size - size };
  const source = (await LoopExtents.open(descriptor, geometry)) ?? new UnknownExtents();
  return new Image(target, format, Buffer.alloc(0), source, geometry);
}

function checkSize(size: number, path: string): void {
  if (Number.isSafeInteger(size)) return;
  throw rangeError('the image is larger than 2^53-1 bytes', 'no larger one can be dealt with', { path });
}

export class Image implements AsyncDisposable {
  readonly path: string;
  readonly kind: 'file' | 'block';
  readonly format: string;
  readonly formatBy: Format['by'];
  /** Bytes that the guest sees; of the container where its format is not raw. */
  readonly size: number;
  /** Bytes: the unit in which storage is given. */
  readonly granularity: number;

  private readonly descriptor: Descriptor;
  private readonly jobs = new Set<Job>();
  private closing: Promise<void> | undefined;

  /** Use {@link open}. */
  constructor(
    target: Target,
    private readonly probed: Format,
    private readonly head: Buffer,
    private readonly source: ExtentSource,
    private readonly geometry: Geometry,
  ) {
    this.descriptor = target.descriptor;
    this.path = target.descriptor.path;
    this.kind = target.kind;
    this.format = probed.name;
    this.formatBy = probed.by;
    this.size = geometry.size;
    this.granularity = geometry.granularity;
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
    yield* this.source.pages(resolveRange(range, this.size, this.path));
  }

  /** How the extents are read; null for a device that has none. */
  get extentMethod(): ExtentMethod | null {
    return this.source.method;
  }

  /** What {@link allocate} would do; changes nothing. Throws as `allocate` rejects. */
  async plan(request: AllocationRequest = {}): Promise<Plan> {
    return (await this.planned(request)).plan;
  }

  /** What {@link allocate} would return, with `after` and `verified` null; changes nothing. */
  async dryRun(request: AllocationRequest = {}): Promise<AllocationResult> {
    const began = performance.now();
    const { plan, scope, level } = await this.planned(request);
    const image = this.forJob();
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
    await this.check();
    const image = this.forJob();
    const scope = scopeOf(image, request);
    const level = request.preallocation ?? 'falloc';
    const plan = await planFor(image, { range: scope.effective, level, route: request.route });
    return { plan, scope, level };
  }

  /**
   * Starts to give storage to what lacks it in a range; see {@link Job}. Data stays as it is.
   * `signal` cancels.
   */
  allocate(request: AllocationRequest & { signal?: AbortSignal } = {}): Job {
    if (this.closing) throw errors.closed(this.path);
    const { signal, ...plain } = request;
    const job = new Job(this.forJob(), plain, signal);
    this.jobs.add(job);
    void job.result.catch(() => undefined).finally(() => this.jobs.delete(job));
    return job;
  }

  /** Whether every byte of a range has the storage that a level promises. */
  async verify(
    request: { offset?: number; length?: number; preallocation?: Preallocation } = {},
  ): Promise<Verdict> {
    const image = this.forJob();
    const { plan, level } = await this.planned(request);
    const { missing, missingRanges, exact } = plan.survey;
    const warnings = [...image.warnings];
    if (image.noGuarantee !== null) warnings.push(`no guarantee: ${image.noGuarantee}`);
    if (!exact) warnings.push('there are too many missing ranges to list: neighbours are merged');
    return {
      target: this.path,
      preallocation: level,
      satisfied: missing === 0 && image.exact && image.noGuarantee === null,
      missing: missingRanges,
      warnings,
    };
  }

  /** Format, sizes, what is allocated and missing, who uses the image, what its storage can do. */
  async info(): Promise<ImageInfo> {
    const image = this.forJob();
    const raw = this.format === 'raw';
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(image, { range, level: 'falloc' });
    const facts = await this.descriptor.use((fd) => fstatFile(fd));
    const known = raw && image.exact;
    const usersOf = this.kind === 'file' ? fileUse : deviceUse;
    const { use, unsure } = await usersOf(this.descriptor);
    const unseen = unsure ? ['whether something else uses the image can’t be told from here'] : [];
    return {
      target: this.path,
      kind: this.kind,
      format: this.format,
      formatBy: this.formatBy,
      virtualSize: raw ? this.size : virtualSizeOf(this.format, this.head),
      fileSize: this.kind === 'file' ? this.size : null,
      hostAllocated: this.kind === 'file' ? facts.blocks * 512 : null,
      allocated: known ? survey.met : null,
      missing: known ? survey.missing : null,
      needed: {
        metadata: null,
        falloc: known ? survey.needed : null,
        full: known ? survey.needed : null,
      },
      granularity: this.granularity,
      inUse: use,
      filesystem: await this.filesystemInfo(survey.shared),
      backing: [],
      snapshots: 0,
      warnings: [...image.warnings, ...unseen],
    };
  }

  private async filesystemInfo(shared: number): Promise<ImageInfo['filesystem']> {
    const storage = storageOf(this.source);
    if (!storage) return null;
    const { filesystem } = storage;
    const space = await spaceOf(storage);
    const abilities = Object.entries(filesystem.abilities);
    return {
      type: filesystem.type,
      free: space.available,
      abilities: abilities.filter(([, has]) => has).map(([name]) => name),
      cow: filesystem.cow,
      reflinked: this.source.method === 'fiemap' ? shared > 0 : null,
    };
  }

  /** Entries as `qemu-img map` gives them, with the host's state. */
  async *map(range: { offset?: number; length?: number } = {}): AsyncGenerator<MapEntry> {
    for await (const { offset, length, depth, present, zero, data, host } of this.extents(range)) {
      yield { start: offset, length, depth, present, zero, data, offset, host };
    }
  }

  /** What can't be told or promised of this image, for people. */
  get warnings(): string[] {
    return this.forJob().warnings;
  }

  /** Cancels the jobs, waits for what is in flight, and closes. Safe to call again. */
  close(): Promise<void> {
    this.closing ??= this.end();
    return this.closing;
  }

  private async end(): Promise<void> {
    for (const job of this.jobs) job.cancel();
    await Promise.allSettled([...this.jobs].map((job) => job.result));
    await this.source[Symbol.asyncDispose]();
    await this.descriptor.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }

  private async check(): Promise<void> {
    if (this.closing) throw errors.closed(this.path);
    requireRaw(this.path, this.probed);
    if (this.kind === 'block') return;
    const { size } = await this.descriptor.use((fd) => fstatFile(fd));
    if (size !== this.size) {
      throw errors.changed(this.path, `the image’s size went from ${this.size} to ${size} bytes`);
    }
  }

  private forJob(): JobImage {
    const { source } = this;
    const filesystem = source.filesystem;
    const exact = tellsReserved(source);
    return {
      path: this.path,
      format: this.format,
      size: this.size,
      granularity: this.granularity,
      source,
      facts: {
        path: this.path,
        kind: this.kind,
        abilities: filesystem?.abilities ?? { fallocate: false, unshare: false },
      },
      storage: storageOf(source),
      liveness: new FileLiveness(this.descriptor, this.kind),
      exact,
      noGuarantee: filesystem ? filesystem.noGuarantee : 'a block device does not tell what is behind it',
      warnings: this.findWarnings(exact),
      check: () => this.check(),
      route: (name, request) => routeOf(mechanismOf(name), this.routeContext(request)),
    };
  }

  private routeContext(request: RouteRequest): RouteContext {
    const filesystem = this.kind === 'file' ? this.source.filesystem : null;
    const { size, granularity } = this;
    return { ...request, image: this.descriptor, size, filesystem, granularity };
  }

  private findWarnings(exact: boolean): string[] {
    const warnings = [];
    if (this.probed.doubtful || this.format !== 'raw') {
      warnings.push(`the image looks like ${this.format}: what is told here is of the file itself`);
    }
    if (this.source.filesystem === null) {
      warnings.push('what is allocated behind a block device is unknowable from here');
    } else if (!exact) {
      warnings.push('the file system can’t tell reserved from missing: holes may have storage');
    }
    const { beyond } = this.geometry;
    if (beyond > 0) warnings.push(`the last ${beyond} bytes are no whole sector: they are left alone`);
    return warnings;
  }
}

function storageOf({ file, filesystem }: ExtentSource): Storage | null {
  return file && filesystem ? { file, filesystem } : null;
}

function mechanismOf(name: RouteName): Mechanism<RouteContext> {
  return FILE_ROUTES[name as keyof typeof FILE_ROUTES];
}

/** SEEK_HOLE takes reserved extents for holes. */
function tellsReserved(source: ExtentSource): boolean {
  return source.method !== null && source.method !== 'seek';
}

/** From a qcow2 header (QEMU, docs/interop/qcow2.txt): the size is a big-endian number at 24. */
function virtualSizeOf(format: string, head: Buffer): number | null {
  if (format !== 'qcow2' || head.length < 32) return null;
  const size = head.readBigUInt64BE(24);
  return size <= Number.MAX_SAFE_INTEGER ? Number(size) : null;
}
