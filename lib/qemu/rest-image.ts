/** An image at rest in a format that only QEMU changes: what it is, and how a storage daemon is had to. */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import type { ChainOptions } from '../chain/chain.js';
import type { HeaderFacts } from '../chain/header.js';
import type { Descriptor } from '../descriptor.js';
import { errors } from '../errors.js';
import { fileUse } from '../exclusive.js';
import { bytesByDepth } from '../extent-source.js';
import { readFilesystem, type Filesystem } from '../filesystem.js';
import { Image } from '../image.js';
import { planFor, type JobImage } from '../job-image.js';
import { NEVER_LIVE } from '../liveness.js';
import type { PlanFacts } from '../plan.js';
import { spaceOf, type Storage } from '../space.js';
import type { AllocationRequest, ImageInfo } from '../types.js';
import { Backing } from './backing.js';

const statOf = promisify(fstat);

/**
 * An image in a format that the caller has stated; `file` is closed with it, also where this fails.
 * Throws what Chain.open throws.
 */
export async function openRest(file: Descriptor, format: string, options: ChainOptions = {}): Promise<Image> {
  try {
    const filesystem = await readFilesystem(file);
    return new RestImage(file, filesystem, await Backing.open(file, format, 0, options));
  } catch (error) {
    await file.close();
    throw error;
  }
}

class RestImage extends Image {
  readonly path: string;
  readonly kind = 'file';
  readonly format: string;
  readonly formatBy = 'option';
  readonly size: number;
  readonly granularity: number;
  private readonly storage: Storage;

  constructor(
    private readonly file: Descriptor,
    private readonly filesystem: Filesystem,
    private readonly backing: Backing,
  ) {
    super();
    this.path = file.path;
    this.format = backing.chain.top.format;
    this.size = this.header.virtualSize;
    this.granularity = this.header.clusterSize;
    this.storage = { file, filesystem };
  }

  private get header(): HeaderFacts {
    return this.backing.chain.top.header!;
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
      source: this.backing.extents,
      get facts() {
        return image.planFacts();
      },
      storage: this.storage,
      liveness: NEVER_LIVE,
      exact: true,
      noGuarantee: this.filesystem.noGuarantee,
      get warnings() {
        return image.backing.warningsFor(image.size);
      },
      check: (request) => this.check(request),
      route: (name, request) => this.backing.route(name, request, this.granularity),
    };
  }

  private planFacts(): PlanFacts {
    return {
      path: this.path,
      kind: 'rest',
      abilities: { fallocate: false, unshare: false },
      backed: this.backing.layers.length > 0,
      subclusters: this.header.subclusters,
    };
  }

  private async refresh(): Promise<void> {
    this.throwIfClosed();
    await this.backing.refresh();
    const { virtualSize, clusterSize } = this.header;
    if (virtualSize === this.size && clusterSize === this.granularity) return;
    throw errors.changed(this.path, `the virtual size went from ${this.size} to ${virtualSize} bytes`);
  }

  private async check(request: AllocationRequest): Promise<void> {
    await this.refresh();
    this.backing.checkDrop(request, this.size, this.header.snapshots);
  }

  async info(): Promise<ImageInfo> {
    await this.refresh();
    // Before a daemon of ours has it open.
    const { use } = await fileUse(this.file);
    const image = this.forJob();
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(image, { range, level: 'metadata' });
    const { size, blocks } = await this.file.use((fd) => statOf(fd));
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
      backing: await this.backing.info(await bytesByDepth(image.source, range)),
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
    await this.backing[Symbol.asyncDispose]();
    await this.file.close();
  }
}

