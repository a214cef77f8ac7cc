/** qcow2 images at rest, whose tables thicken reads and changes itself. */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from '../descriptor.js';
import { errors, ThickenError } from '../errors.js';
import { fileInUse, fileUse } from '../exclusive.js';
import type { Extent } from '../extent.js';
import { bytesByDepth, FileExtents, tellsReserved, type ExtentSource } from '../extent-source.js';
import { readFilesystem } from '../filesystem.js';
import { requireStated, type Format } from '../format.js';
import { entryAt, Image } from '../image.js';
import { planFor, scopeOf, type JobImage } from '../job-image.js';
import { FileLiveness } from '../liveness.js';
import type { CancelFlag, Qcow2Facts } from '../native.js';
import type { OpenOptions } from '../open-options.js';
import type { Plan, PlanFacts } from '../plan.js';
import { resolveRange } from '../range.js';
import { qcow2Route, type Qcow2Context } from '../routes/qcow2.js';
import type { Route, RouteRequest } from '../routes/route.js';
import type { Target } from '../target.js';
import type { AllocationRequest, ImageInfo, MapEntry, RouteName } from '../types.js';
import type { Backing } from '../qemu/backing.js';
import { BackedExtents } from './backed-extents.js';
import { openDataFile } from './data-file.js';
import { qcow2Errors } from './errors.js';
import { Qcow2Extents } from './extents.js';
import { infoOf } from './info.js';
import { ALL_BACKED, findNeeds, NONE_BACKED, type Needs } from './needs.js';
import { compareSpace } from './room.js';
import { Qcow2Reader, type Qcow2Files } from './tables.js';

const factsOfFile = promisify(fstat);

/**
 * A qcow2 image in a file, for reading only; the target's descriptor is closed with it, also where this
 * fails. `fallback` is for a header that turns out to be none.
 */
export async function openQcow2(
  target: Target,
  format: Format,
  options: OpenOptions,
  fallback?: () => Promise<Image>,
): Promise<Image> {
  const { descriptor } = target;
  let opened: Descriptor[] = [descriptor];
  try {
    const reader = await Qcow2Reader.open(descriptor);
    const file = new FileExtents(descriptor, await readFilesystem(descriptor), options.extentMethod);
    const wanted = reader.facts.externalData && format.by === 'option';
    const data = wanted ? await openDataFile(descriptor, reader.facts) : null;
    if (data) opened = [...opened, data.file];
    const trusted = reader.facts.backed && format.by === 'option';
    const backing = trusted ? await openBacking(descriptor, options) : null;
    return new Qcow2Image(descriptor, format, reader, { file, data }, backing);
  } catch (error) {
    if (fallback && error instanceof ThickenError && error.errno === undefined) return fallback();
    await Promise.all(opened.map((one) => one.close()));
    throw error;
  }
}

/** Loaded only where it is needed: what lies below is opened by the caller's word alone. */
async function openBacking(descriptor: Descriptor, options: OpenOptions): Promise<Backing> {
  const { Backing } = await import('../qemu/backing.js');
  return Backing.open(descriptor, 'qcow2', 1, options);
}

export class Qcow2Image extends Image {
  readonly path: string;
  readonly kind = 'file';
  readonly format = 'qcow2';
  readonly formatBy: Format['by'];
  readonly size: number;
  readonly granularity: number;

  private readonly source: ExtentSource;
  /** What the request takes, as last looked at. */
  private needs: Needs | null = null;

  constructor(
    private readonly descriptor: Descriptor,
    private readonly probed: Format,
    private readonly reader: Qcow2Reader,
    private readonly files: Qcow2Files,
    /** What lies below, where that is open. */
    private readonly backing: Backing | null,
  ) {
    super();
    this.path = descriptor.path;
    this.formatBy = probed.by;
    this.size = reader.facts.virtualSize;
    this.granularity = reader.facts.clusterSize;
    const own = new Qcow2Extents(reader, files);
    this.source = backing ? new BackedExtents(own, backing.extents) : own;
  }

  get facts(): Qcow2Facts {
    return this.reader.facts;
  }

  /** What a check finds out shows in it at once. */
  protected forJob(): JobImage {
    const { source, files, descriptor } = this;
    // eslint-disable-next-line @typescript-eslint/no-this-alias -- for the getters
    const image = this;
    return {
      ...this.named,
      source,
      get facts() {
        return image.planFacts();
      },
      // Where the guest's data goes: what the tables take elsewhere, the route compares.
      storage: files.data ?? files.file,
      liveness: new FileLiveness(descriptor, 'file'),
      // A first look may show that the file system tells less than was hoped.
      get exact() {
        return tellsReserved(files.file) && (!files.data || tellsReserved(files.data));
      },
      get noGuarantee() {
        return image.whyNoGuarantee();
      },
      get warnings() {
        return image.findWarnings();
      },
      check: (request, cancel) => this.check(request, cancel),
      refuse: (plan) => this.refuse(plan),
      takes: (plan, request) => this.takes(plan, request),
      route: (name, request) => this.route(name, request),
    };
  }

  private planFacts(): PlanFacts {
    const needs = this.needs?.refusal === null ? this.needs.needs : null;
    return {
      path: this.path,
      kind: 'qcow2',
      abilities: this.files.file.filesystem.abilities,
      backed: this.facts.backed,
      opened: this.backing !== null,
      subclusters: this.backing?.chain.top.header?.subclusters ?? false,
      unreserved: needs?.unreserved ?? null,
      takes: needs ? (this.files.data ? needs.dataNeeds : needs.fileNeeds) : null,
      leaked: needs?.surplus ?? 0,
      cluster: this.granularity,
      tellsZeros: this.facts.version >= 3,
    };
  }

  private whyNoGuarantee(): string | null {
    const { file, data } = this.files;
    const { refusal, needs } = this.needs ?? {};
    // An image that QEMU itself would not write to, or whose tables contradict each other.
    if (refusal && refusal.code !== 'NEEDS_POPULATE') return refusal.message;
    const { fallocate, unshare } = file.filesystem.abilities;
    if (needs && needs.reserve > 0 && !fallocate) {
      return 'this file system can’t reserve blocks for what QEMU takes anew: clusters that a write must move, and bitmaps';
    }
    if (needs && needs.sharedTables > 0 && !unshare) {
      return 'its tables share blocks with another file, which this file system can’t unshare';
    }
    if (needs && needs.mixed > 0) {
      return 'clusters that a snapshot shares are marked as zeros in part: a write may need new host blocks';
    }
    if (this.facts.externalData && !data) return 'its data lies in another file, which is not opened';
    return file.filesystem.noGuarantee ?? data?.filesystem.noGuarantee ?? null;
  }

  private findWarnings(): string[] {
    const { facts, probed } = this;
    const warnings = [...this.remarks];
    if (probed.doubtful) warnings.push('only a probe says qcow2, and a guest can write that into a raw disk');
    if (!tellsReserved(this.files.file)) {
      warnings.push('the file system can’t tell reserved from missing: holes may have storage');
    }
    if (this.backing) warnings.push(...this.backing.warningsFor(this.size));
    else if (facts.backed) warnings.push('the backing file is not opened: what it has is not known');
    if (facts.externalData && !this.files.data) {
      warnings.push('its data lies in another file, which is only opened where --format says qcow2');
    }
    if (facts.writable.code !== 'OK') warnings.push(facts.writable.message);
    return warnings;
  }

  /** Reads everything afresh: somebody else may have changed it since. */
  private async check(request: AllocationRequest, cancel?: CancelFlag): Promise<void> {
    this.throwIfClosed();
    requireStated(this.path, this.probed);
    await this.refresh();
    await this.backing?.refresh();
    this.checkDrop(request);
    if (this.facts.externalData && !this.files.data) {
      throw qcow2Errors.dataFileWanted(this.path, this.facts.dataFile ?? '');
    }
    const { effective: range } = scopeOf(this.forJob(), request);
    const level = request.preallocation ?? 'falloc';
    // What comes from below is copied first: as if it was no more than room that it needs.
    const populated = this.backing !== null && request.route !== 'qcow2';
    const backingEnd = populated ? NONE_BACKED : ALL_BACKED;
    this.needs = await findNeeds(this.files, { range, level, backingEnd }, cancel);
  }

  private checkDrop(request: AllocationRequest): void {
    const { backed, snapshots } = this.facts;
    if (request.dropBacking && backed && !this.backing) throw errors.belowWanted(this.path);
    this.backing?.checkDrop(request, this.size, snapshots);
  }

  private route(name: RouteName, request: RouteRequest): Route {
    if (name === 'qcow2' || !this.backing) return qcow2Route(this.context(request));
    return this.backing.route(name, request, this.granularity, () => this.reader.refresh());
  }

  private async refresh(): Promise<void> {
    const { virtualSize, clusterSize } = this.facts;
    await this.reader.refresh();
    const { facts } = this;
    if (facts.virtualSize === virtualSize && facts.clusterSize === clusterSize) return;
    throw errors.changed(
      this.path,
      `the virtual size went from ${virtualSize} to ${facts.virtualSize} bytes`,
    );
  }

  /**
   * What QEMU has open may look broken from here: that it is in use says more. Where content comes
   * from a backing file, the plan has a populate pass that must come before ours.
   */
  private async refuse(plan: Plan): Promise<void> {
    const below = !this.backing && plan.passes.some(({ route }) => route === 'populate');
    // That content comes from below is for the caller to decide, before all that our tables lack.
    const refusal = below ? errors.belowWanted(this.path) : this.needs?.refusal;
    if (plan.passes.some(({ route }) => route !== 'qcow2')) this.backing?.checkKey();
    if (!refusal) return;
    const { use } = await fileUse(this.descriptor);
    throw use ? await fileInUse(this.descriptor, true) : refusal;
  }

  /** What is copied lies where QEMU puts it; all else follows, and takes what it would take alone. */
  private async takes({ passes, survey }: Plan, request: AllocationRequest): Promise<number | null> {
    if (!passes.some(({ route }) => route === 'populate')) return null;
    const { effective: range } = scopeOf(this.forJob(), request);
    const level = request.route === 'populate' ? 'metadata' : (request.preallocation ?? 'falloc');
    const { files } = this;
    const asked = { range, level, backingEnd: NONE_BACKED, copied: survey.copied };
    const { needs } = await findNeeds(files, asked);
    await compareSpace(files, needs, request.keepFree);
    return files.data ? needs.dataNeeds : needs.fileNeeds;
  }

  private context(request: RouteRequest): Qcow2Context {
    const { descriptor, files, size, granularity } = this;
    return { ...request, image: descriptor, files, size, granularity };
  }

  async info(): Promise<ImageInfo> {
    this.throwIfClosed();
    await this.refresh();
    await this.backing?.refresh();
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(this.forJob(), { range, level: 'falloc' });
    const stats = await this.descriptor.use((fd) => factsOfFile(fd));
    const { backing } = this;
    return this.infoWith({
      fileSize: stats.size,
      hostAllocated: stats.blocks * 512,
      ...(await infoOf({ image: this.forJob(), facts: this.facts, files: this.files, survey, range })),
      ...(backing && { backing: await backing.info(await bytesByDepth(this.source, range)) }),
    });
  }

  /** By the tables as they are now: L2 tables are read at each look, and so is what is above them. */
  override async *extentPages(range: { offset?: number; length?: number } = {}) {
    await this.refresh();
    yield* super.extentPages(range);
  }

  /**
   * As `qemu-img map` tells it: data is called zeros too where the host has nothing written, but only
   * in an image with fewer blocks than clusters, in which QEMU asks the host (7.2).
   */
  protected override async mapEntries(): Promise<(extent: Extent) => MapEntry> {
    await this.refresh();
    const { encrypted } = this.facts;
    const asksHost = !encrypted && (await this.reader.looksPreallocated());
    return (extent) => {
      const { zero, data, host, at } = extent;
      const unwritten = host === 'hole' || host === 'unwritten';
      return entryAt(extent, encrypted && extent.depth === 0 ? undefined : at, zero || (asksHost && data && unwritten));
    };
  }

  protected override get needsKey(): boolean {
    return this.backing?.needsKey ?? false;
  }

  protected override mapExtents(range: { offset?: number; length?: number }) {
    const pages = super.mapExtents(range);
    return this.backing?.placed(pages, resolveRange(range, this.size, this.path)) ?? pages;
  }

  protected override fileAt(depth: number): string | undefined {
    return this.backing?.chain.layers[depth]?.path;
  }

  protected async release(): Promise<void> {
    this.reader.close();
    await this.files.data?.file.close();
    await this.backing?.[Symbol.asyncDispose]();
    await this.descriptor.close();
  }
}
