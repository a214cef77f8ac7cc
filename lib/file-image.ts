/** Raw image files and block devices, which thicken reads and changes itself. */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from './descriptor.js';
import { errors, rangeError } from './errors.js';
import { deviceUse, fileUse } from './exclusive.js';
import {
  FileExtents,
  LoopExtents,
  tellsReserved,
  UnknownExtents,
  type ExtentSource,
} from './extent-source.js';
import { readFilesystem } from './filesystem.js';
import { requireRaw, type Format } from './format.js';
import { Image, rawStorage } from './image.js';
import { planFor, type JobImage } from './job-image.js';
import { FileLiveness } from './liveness.js';
import { native } from './native.js';
import type { OpenOptions } from './open-options.js';
import { probe } from './probe.js';
import { roundDown } from './range.js';
import { FILE_ROUTES } from './routes/index.js';
import { routeOf, type Mechanism, type RouteContext, type RouteRequest } from './routes/route.js';
import { filesystemInfo, type Storage } from './space.js';
import type { Target } from './target.js';
import type { ImageInfo, RouteName } from './types.js';

const fstatFile = promisify(fstat);

/** Zero runs on a device are looked for in pages: the usual block of a file system on it. */
const DEVICE_UNIT = 4096;

interface Geometry {
  /** Bytes. */
  size: number;
  granularity: number;
  /** Bytes at the end of a device that are no whole sector, and can't be read or written alone. */
  beyond: number;
}

/**
 * An image file or a block device, for reading only; `opened` is closed with the image, also where
 * this fails. Throws the errno's name, UNSUPPORTED, USAGE, RANGE.
 */
export async function openFile(target: Target, options: OpenOptions = {}): Promise<Image> {
  try {
    return await describe(target, options);
  } catch (error) {
    await target.descriptor.close();
    throw error;
  }
}

async function describe(target: Target, options: OpenOptions): Promise<Image> {
  const { descriptor } = target;
  const [{ size }, filesystem, { head, format }] = await Promise.all([
    descriptor.use((fd) => fstatFile(fd)),
    target.kind === 'file' ? readFilesystem(descriptor) : null,
    probe(descriptor, options.format),
  ]);
  if (!filesystem) return describeDevice(target, format);
  checkSize(size, descriptor.path);
  const source = new FileExtents(descriptor, filesystem, options.extentMethod);
  const geometry = { size, granularity: filesystem.blockSize, beyond: 0 };
  return new FileImage(target, format, head, source, geometry);
}

async function describeDevice(target: Target, format: Format): Promise<Image> {
  const { descriptor } = target;
  const facts = await descriptor.use((fd) => native().deviceFacts(fd));
  checkSize(facts.size, descriptor.path);
  const size = roundDown(facts.size, facts.logicalSector);
  const granularity = Math.max(DEVICE_UNIT, facts.logicalSector);
  const geometry = { size, granularity, beyond: facts.size - size };
  const source = (await LoopExtents.open(descriptor, geometry)) ?? new UnknownExtents();
  return new FileImage(target, format, Buffer.alloc(0), source, geometry);
}

function checkSize(size: number, path: string): void {
  if (Number.isSafeInteger(size)) return;
  throw rangeError('the image is larger than 2^53-1 bytes', 'no larger one can be dealt with', { path });
}

class FileImage extends Image {
  readonly path: string;
  readonly kind: 'file' | 'block' | 'qemu';
  readonly format: string;
  readonly formatBy: Format['by'];
  readonly size: number;
  readonly granularity: number;

  private readonly descriptor: Descriptor;

  constructor(
    private readonly target: Target,
    private readonly probed: Format,
    private readonly head: Buffer,
    private readonly source: ExtentSource,
    private readonly geometry: Geometry,
  ) {
    super();
    this.descriptor = target.descriptor;
    this.path = target.name ?? target.descriptor.path;
    this.kind = target.name === undefined ? target.kind : 'qemu';
    this.format = probed.name;
    this.formatBy = probed.by;
    this.size = geometry.size;
    this.granularity = geometry.granularity;
  }

  /** Format, sizes, what is allocated and missing, who uses the image, what its storage can do. */
  async info(): Promise<ImageInfo> {
    const image = this.forJob();
    const raw = this.format === 'raw';
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(image, { range, level: 'falloc' });
    const facts = await this.descriptor.use((fd) => fstatFile(fd));
    const known = raw && image.exact;
    const reflinked = this.source.method === 'fiemap' ? survey.shared > 0 : null;
    const { kind } = this.target;
    const usersOf = kind === 'file' ? fileUse : deviceUse;
    const { use, warnings } = await usersOf(this.descriptor);
    return this.infoWith({
      ...(raw ? {} : await this.headerFacts()),
      fileSize: kind === 'file' ? this.size : null,
      hostAllocated: kind === 'file' ? facts.blocks * 512 : null,
      ...(known && rawStorage(survey)),
      inUse: use,
      filesystem: image.storage && (await filesystemInfo(image.storage, reflinked)),
      warnings: [...image.warnings, ...warnings],
    });
  }

  /** What another format's header tells by itself: nothing else is opened for it. */
  private async headerFacts(): Promise<Partial<ImageInfo>> {
    const { format, descriptor, head } = this;
    const { hasBacking, readHeader } = await import('./chain/header.js');
    const header = hasBacking(format) ? await readHeader(descriptor, format).catch(() => null) : null;
    const below = header?.backing;
    return {
      virtualSize: header?.virtualSize ?? virtualSizeOf(format, head),
      backing: below ? [{ path: below.name, format: below.format, virtualSize: null }] : [],
      snapshots: header?.snapshots ?? 0,
    };
  }

  private async check(): Promise<void> {
    this.throwIfClosed();
    requireRaw(this.path, this.probed, this.target.kind);
    if (this.target.kind === 'block') return;
    const { size } = await this.descriptor.use((fd) => fstatFile(fd));
    if (size !== this.size) {
      throw errors.changed(this.path, `the image’s size went from ${this.size} to ${size} bytes`);
    }
  }

  protected async release(): Promise<void> {
    await this.source[Symbol.asyncDispose]();
    await this.descriptor.close();
  }

  protected forJob(): JobImage {
    const { source } = this;
    const filesystem = source.filesystem;
    const exact = tellsReserved(source);
    return {
      ...this.named,
      source,
      facts: {
        path: this.path,
        kind: this.target.kind,
        abilities: filesystem?.abilities ?? { fallocate: false, unshare: false },
      },
      storage: storageOf(source),
      liveness: new FileLiveness(this.descriptor, this.target.kind),
      exact,
      noGuarantee: filesystem ? filesystem.noGuarantee : 'a block device does not tell what is behind it',
      warnings: this.findWarnings(exact),
      check: () => this.check(),
      route: (name, request) => routeOf(mechanismOf(name), this.routeContext(request)),
    };
  }

  private routeContext(request: RouteRequest): RouteContext {
    const filesystem = this.target.kind === 'file' ? this.source.filesystem : null;
    const { size, granularity } = this;
    return { ...request, image: this.descriptor, size, filesystem, granularity };
  }

  private findWarnings(exact: boolean): string[] {
    const warnings = [...this.remarks];
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

/** From a qcow2 header (QEMU, docs/interop/qcow2.txt): the size is a big-endian number at 24. */
function virtualSizeOf(format: string, head: Buffer): number | null {
  if (format !== 'qcow2' || head.length < 32) return null;
  const size = head.readBigUInt64BE(24);
  return size <= Number.MAX_SAFE_INTEGER ? Number(size) : null;
}
