/** An image at rest in a format that QEMU writes: what it is, and how a storage daemon is had to. */
import type { Descriptor } from '../descriptor.js';
import { errors } from '../errors.js';
import { fileInUse, fileUse } from '../exclusive.js';
import type { Extent } from '../extent.js';
import { bytesByDepth } from '../extent-source.js';
import type { Format } from '../format.js';
import { entryAt, Image } from '../image.js';
import { planFor, type JobImage } from '../job-image.js';
import { NEVER_LIVE } from '../liveness.js';
import { native, type CancelFlag } from '../native.js';
import type { OpenOptions } from '../open-options.js';
import type { PassRequest } from '../pass.js';
import type { PlanFacts, Survey } from '../plan.js';
import { resolveRange } from '../range.js';
import type { Route, RouteRequest } from '../routes/route.js';
import { filesystemInfo } from '../space.js';
import type { AllocationRequest, ImageInfo, MapEntry, RouteName } from '../types.js';
import { Backing } from './backing.js';
import { diskErrors } from './errors.js';
import { StoredFile } from './stored-file.js';
import { checkStored, clusterOf, tellsMap } from './stored-formats.js';
import { StoredSource } from './stored-source.js';

export { isStored } from './stored-formats.js';

interface Geometry {
  /** Bytes. */
  size: number;
  clusterSize: number;
}

/**
 * An image in a format that `isStored`; `file` is closed with it, also where this fails. Throws
 * UNSUPPORTED for kinds of it that can't be dealt with, and what Chain.open and StorageDaemon throw.
 */
export async function openStored(file: Descriptor, format: Format, options: OpenOptions = {}): Promise<Image> {
  try {
    await checkStored(file, format.name);
    const stored = await StoredFile.open(file);
    const backing = await Backing.open(file, format.name, 0, options);
    try {
      return new StoredImage(stored, format, backing, await geometryOf(backing, file));
    } catch (error) {
      await backing[Symbol.asyncDispose]();
      throw error;
    }
  } catch (error) {
    await file.close();
    throw error;
  }
}

async function geometryOf(backing: Backing, file: Descriptor): Promise<Geometry> {
  const { header, format } = backing.chain.top;
  if (header) return { size: header.virtualSize, clusterSize: header.clusterSize };
  const { size, clusterSize } = await backing.node();
  return { size, clusterSize: clusterSize ?? (await clusterOf(file, format)) };
}

class StoredImage extends Image {
  readonly path: string;
  readonly kind = 'file';
  readonly format: string;
  readonly formatBy: Format['by'];
  readonly size: number;
  readonly granularity: number;
  private readonly source: StoredSource;
  /** Bytes of the file that lack what was asked for last. */
  private unreserved = 0;

  constructor(
    private readonly stored: StoredFile,
    format: Format,
    private readonly backing: Backing,
    { size, clusterSize }: Geometry,
  ) {
    super();
    this.path = stored.file.path;
    this.format = format.name;
    this.formatBy = format.by;
    this.size = size;
    this.granularity = clusterSize;
    this.source = new StoredSource(backing.extents, tellsMap(format.name));
  }

  /** What a check finds out shows in it at once. */
  protected forJob(): JobImage {
    const { stored } = this;
    // eslint-disable-next-line @typescript-eslint/no-this-alias -- for the getters
    const image = this;
    return {
      ...this.named,
      source: this.source,
      get facts() {
        return image.planFacts();
      },
      storage: stored,
      liveness: NEVER_LIVE,
      exact: stored.tells && tellsMap(this.format),
      noGuarantee: stored.filesystem.noGuarantee,
      get warnings() {
        return image.findWarnings();
      },
      check: (request) => this.check(request),
      route: (name, request) => this.route(name, request),
      passOf: (name, request) => this.passOf(name, request),
    };
  }

  private planFacts(): PlanFacts {
    return {
      path: this.path,
      kind: 'stored',
      abilities: this.stored.filesystem.abilities,
      backed: this.backing.layers.length > 0,
      unreserved: this.unreserved,
    };
  }

  private findWarnings(): string[] {
    const warnings = [...this.remarks, ...this.backing.warningsFor(this.size)];
    if (!tellsMap(this.format)) {
      warnings.push(`QEMU does not tell what a ${this.format} image maps: all of it is looked at, and none of it verified`);
    }
    if (!this.stored.tells) {
      warnings.push('the file system can’t tell reserved from missing: holes may have storage');
    }
    return warnings;
  }

  /** A program that knows nothing of QEMU's locks may have it open: it must not be written to then. */
  private route(name: RouteName, request: RouteRequest): Route {
    const { file } = this.stored;
    const route = this.backing.route(name, request, this.granularity);
    const open = async (cancel: CancelFlag) => {
      await this.backing.letGo();
      if (await file.use((fd) => native().probeWriter(fd))) throw await fileInUse(file, true);
      return route.open(cancel);
    };
    return { ...route, open };
  }

  private async passOf(name: RouteName, request: RouteRequest): Promise<Partial<PassRequest> | null> {
    if (name !== 'fallocate' && name !== 'zero-write') return null;
    return this.stored.pass(name, request, () => this.backing.letGo());
  }

  private async refresh(): Promise<void> {
    this.throwIfClosed();
    await this.backing.refresh();
    const { size, clusterSize } = await geometryOf(this.backing, this.stored.file);
    if (size === this.size && clusterSize === this.granularity) return;
    throw errors.changed(this.path, `the virtual size went from ${this.size} to ${size} bytes`);
  }

  private async check(request: AllocationRequest): Promise<void> {
    await this.refresh();
    const drops = (request.dropBacking ?? false) || request.route === 'stream';
    if (drops && this.format === 'vmdk' && this.backing.layers.length > 0) throw diskErrors.keepsBacking(this.path);
    const level = request.preallocation ?? 'falloc';
    this.unreserved = level === 'metadata' ? 0 : await this.stored.missing(level);
    this.backing.checkDrop(request, this.size, 0);
  }

  async info(): Promise<ImageInfo> {
    this.throwIfClosed();
    await this.backing.refresh();
    // Before a daemon of ours has it open.
    const { use, warnings } = await fileUse(this.stored.file);
    const image = this.forJob();
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(image, { range, level: 'metadata' });
    const { size, blocks } = await this.stored.sizes();
    return this.infoWith({
      fileSize: size,
      hostAllocated: blocks,
      ...(image.exact && (await this.told(survey))),
      inUse: use,
      filesystem: await filesystemInfo(this.stored, null),
      backing: await this.backing.info(await bytesByDepth(this.backing.extents, range)),
      warnings: [...image.warnings, ...warnings],
    });
  }

  /** What is needed: bytes of the clusters to come, and of what the file lacks. */
  private async told({ met, missing }: Survey): Promise<Partial<ImageInfo>> {
    const all = missing + (await this.stored.missing('falloc'));
    return { allocated: met, missing, needed: { metadata: missing, falloc: all, full: all } };
  }

  /** Over NBD, QEMU does not tell where in the image's own file a cluster lies. */
  protected override mapEntries(): Promise<(extent: Extent) => MapEntry> {
    return Promise.resolve((extent) => entryAt(extent, extent.at));
  }

  protected override get needsKey(): boolean {
    return this.backing.needsKey;
  }

  protected override mapExtents(range: { offset?: number; length?: number }) {
    return this.backing.placed(super.mapExtents(range), resolveRange(range, this.size, this.path));
  }

  protected override fileAt(depth: number): string | undefined {
    return this.backing.chain.layers[depth]?.path;
  }

  protected async release(): Promise<void> {
    await this.backing[Symbol.asyncDispose]();
    await this.stored.file.close();
  }
}
