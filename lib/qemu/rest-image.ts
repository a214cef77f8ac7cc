/** An image at rest that lies on others: what it is, and how the storage daemon is had to change it. */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import { Chain, type ChainOptions } from '../chain/chain.js';
import type { HeaderFacts } from '../chain/header.js';
import type { Descriptor } from '../descriptor.js';
import { errors } from '../errors.js';
import { fileUse } from '../exclusive.js';
import { readFilesystem, type Filesystem } from '../filesystem.js';
import { Image } from '../image.js';
import { planFor, type JobImage } from '../job-image.js';
import { NEVER_LIVE } from '../liveness.js';
import type { PlanFacts } from '../plan.js';
import { populateRoute, type GuestContext } from '../routes/populate.js';
import type { Mechanism, Route, RouteRequest } from '../routes/route.js';
import { streamRoute } from '../routes/stream.js';
import { spaceOf, type Storage } from '../space.js';
import type { AllocationRequest, ImageInfo, RouteName } from '../types.js';
import { diskErrors } from './errors.js';
import { layersInfo } from './rest-info.js';
import { restRoute } from './rest-route.js';
import { RestSource } from './rest-source.js';

const statOf = promisify(fstat);

const MECHANISMS: Partial<Record<RouteName, Mechanism<GuestContext>>> = {
  populate: populateRoute,
  stream: streamRoute,
};

/**
 * An image in a format that the caller has stated; `file` is closed with it, also where this fails.
 * Throws what Chain.open throws.
 */
export async function openRest(file: Descriptor, format: string, options: ChainOptions = {}): Promise<Image> {
  try {
    const filesystem = await readFilesystem(file);
    const chain = await Chain.open(file, format, options);
    return new RestImage(file, filesystem, chain, options);
  } catch (error) {
    await file.close();
    throw error;
  }
}

class RestImage extends Image {
  readonly kind = 'file';
  readonly formatBy = 'option';
  private readonly source: RestSource;
  private readonly storage: Storage;

  constructor(
    private readonly file: Descriptor,
    private readonly filesystem: Filesystem,
    private chain: Chain,
    private readonly options: ChainOptions,
  ) {
    super();
    this.storage = { file, filesystem };
    this.source = new RestSource(() => this.chain);
  }

  get path(): string {
    return this.file.path;
  }

  get format(): string {
    return this.chain.top.format;
  }

  get size(): number {
    return this.header.virtualSize;
  }

  get granularity(): number {
    return this.header.clusterSize;
  }

  private get header(): HeaderFacts {
    return this.chain.top.header!;
  }

  /** What a check finds out shows in it at once. */
  protected forJob(): JobImage {
    // eslint-disable-next-line @typescript-eslint/no-this-alias -- for the getters
    const image = this;
    return {
      path: this.path,
      format: this.format,
      size: this.size,
      granularity: this.granularity,
      source: this.source,
      get facts() {
        return image.planFacts();
      },
      storage: this.storage,
      liveness: NEVER_LIVE,
      exact: true,
      noGuarantee: this.filesystem.noGuarantee,
      get warnings() {
        return image.findWarnings();
      },
      check: (request) => this.check(request),
      route: (name, request) => this.route(name, request),
    };
  }

  private planFacts(): PlanFacts {
    return {
      path: this.path,
      kind: 'rest',
      abilities: { fallocate: false, unshare: false },
      backed: this.chain.below.length > 0,
      subclusters: this.header.subclusters,
    };
  }

  private findWarnings(): string[] {
    const warnings = this.source.shared ? ['somebody else has the image open: what is told of it may be behind'] : [];
    for (const { path, virtualSize } of this.chain.below) {
      if (virtualSize === null || virtualSize >= this.size) continue;
      warnings.push(`${path} is smaller than the image: what lies past its end reads as zeros`);
    }
    return warnings;
  }

  private route(name: RouteName, request: RouteRequest): Route {
    const mechanism = MECHANISMS[name];
    if (!mechanism) throw new Error(`no mechanism for ${name}`);
    const { granularity } = this;
    return restRoute(mechanism, { ...request, granularity, chain: () => this.chain, letGo: () => this.source.letGo() });
  }

  /** Whatever has been known of the image and of what lies below it is looked at anew. */
  private async refresh(): Promise<void> {
    this.throwIfClosed();
    await this.source.letGo();
    const fresh = await Chain.open(this.file, this.format, this.options);
    const { size } = this;
    const old = this.chain;
    this.chain = fresh;
    await old[Symbol.asyncDispose]();
    if (this.size !== size) {
      throw errors.changed(this.path, `the image’s size went from ${size} to ${this.size} bytes`);
    }
  }

  private async check(request: AllocationRequest): Promise<void> {
    await this.refresh();
    if (!request.dropBacking && request.route !== 'stream') return;
    const { offset = 0, length = this.size } = request;
    if (offset !== 0 || length < this.size) throw diskErrors.shortBacking(this.path);
    const { snapshots } = this.header;
    if (snapshots > 0 && this.chain.below.length > 0) throw diskErrors.hasSnapshots(this.path, snapshots);
  }

  async info(): Promise<ImageInfo> {
    await this.refresh();
    const image = this.forJob();
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(image, { range, level: 'metadata' });
    const { size, blocks } = await this.file.use((fd) => statOf(fd));
    const { use } = await fileUse(this.file);
    return {
      target: this.path,
      kind: this.kind,
      format: this.format,
      formatBy: this.formatBy,
      virtualSize: this.size,
      fileSize: size,
      hostAllocated: blocks * 512,
      allocated: survey.met,
      missing: survey.missing,
      needed: { metadata: survey.needed, falloc: null, full: null },
      granularity: this.granularity,
      inUse: use,
      filesystem: await this.filesystemInfo(),
      backing: await layersInfo(this.source, this.chain, range),
      snapshots: this.header.snapshots,
      warnings: image.warnings,
    };
  }

  private async filesystemInfo(): Promise<ImageInfo['filesystem']> {
    const { type, abilities, cow } = this.filesystem;
    const { available: free } = await spaceOf(this.storage);
    const names = Object.entries(abilities).filter(([, has]) => has).map(([name]) => name);
    return { type, free, abilities: names, cow, reflinked: null };
  }

  protected async release(): Promise<void> {
    await this.source.letGo();
    await this.chain[Symbol.asyncDispose]();
    await this.file.close();
  }
}

