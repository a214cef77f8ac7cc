/** A disk that a running QEMU has open: what it is, and how QEMU is had to allocate it. */
import { errors, toThickenError } from '../errors.js';
import { openFile } from '../file-image.js';
import { Image } from '../image.js';
import type { JobImage } from '../job-image.js';
import { planFor } from '../job-image.js';
import { ALWAYS_LIVE } from '../liveness.js';
import type { OpenOptions } from '../open-options.js';
import type { PlanFacts } from '../plan.js';
import { startDetachedStream } from '../qmp/block-jobs.js';
import { QmpClient } from '../qmp/client.js';
import { populateRoute, type GuestContext } from '../routes/populate.js';
import { routeOf, type Mechanism, type RouteRequest } from '../routes/route.js';
import { streamRoute } from '../routes/stream.js';
import { nameOf, type GuestTarget } from '../target.js';
import type {
  AllocationRequest,
  DetachedResult,
  ImageInfo,
  RouteName,
} from '../types.js';
import { findDisk, type GuestDisk } from './disks.js';
import { diskErrors } from './errors.js';
import { openHostFile } from './host-file.js';
import { HostReserve, type Reserve } from './host-reserve.js';
import { checkThreads } from './iothread.js';
import { NbdExtents } from './nbd-extents.js';
import { NodeExport } from './node-export.js';
import { detachedName } from './owner.js';

export interface GuestOptions extends OpenOptions {
  /** The address of the NBD server that runs in the QEMU already. */
  nbd?: string;
}

/**
 * Throws what QmpClient throws, UNKNOWN_DEVICE, NBD_BUSY, UNSUPPORTED, CHANGED. Nothing that was
 * added to the QEMU stays after that, or after the image is closed.
 */
export async function openGuestDisk(target: GuestTarget, options: GuestOptions = {}): Promise<Image> {
  const client = await QmpClient.connect(target.qmp);
  try {
    const disk = await findDisk(client, target.device);
    if (disk.format === 'raw') return await openRawDisk(client, disk, target);
    await checkThreads(client, disk);
    const added = await NodeExport.add(client, disk.node, options.nbd);
    const host = await openReserve(client, disk).catch(asReason);
    return new GuestImage(client, disk, target, added, ...host);
  } catch (error) {
    await client.close();
    throw error;
  }
}

type Host = [reserve: HostReserve | null, reason: string | null];

/** Only of qcow2 it is known what it may grow to. */
async function openReserve(client: QmpClient, disk: GuestDisk): Promise<Host> {
  if (disk.format !== 'qcow2') return [null, `what a ${disk.format} image may grow to is not known`];
  if (disk.protocol !== null && disk.protocol !== 'file') return [null, `it lies on ${disk.protocol}`];
  if (disk.image['format-specific']?.data['data-file']) return [null, 'its data lies in another file'];
  const reserve = await HostReserve.open(await openHostFile(client, disk));
  if (reserve.tells) return [reserve, null];
  await reserve.close();
  return [null, 'the file system can’t tell reserved from missing'];
}

function asReason(error: unknown): Host {
  return [null, toThickenError(error).message];
}

/** fallocate(2) changes no byte, and is atomic against QEMU's writes: thicken does it itself. */
async function openRawDisk(client: QmpClient, disk: GuestDisk, target: GuestTarget): Promise<Image> {
  if (disk.protocol !== null && disk.protocol !== 'file') {
    throw errors.inUse(nameOf(target), `QEMU, as ${disk.protocol}`, 'allocate it at rest');
  }
  const descriptor = await openHostFile(client, disk);
  await client.close();
  return openFile({ kind: 'file', descriptor, name: nameOf(target) }, { format: 'raw' });
}

const DETACHED =
  'QEMU drops the backing file before its tables are flushed: keep the backing file until the ' +
  'guest has been shut down cleanly';

const MECHANISMS: Partial<Record<RouteName, Mechanism<GuestContext>>> = {
  populate: populateRoute,
  stream: streamRoute,
};

class GuestImage extends Image {
  readonly path: string;
  readonly kind = 'qemu';
  readonly formatBy = 'option';
  private readonly source: NbdExtents;
  /** What the container may grow to, and the bytes of it that lack host blocks; as last looked at. */
  private reserve: (Reserve & { missing: number }) | null = null;

  constructor(
    private readonly client: QmpClient,
    private disk: GuestDisk,
    private readonly target: GuestTarget,
    private readonly added: NodeExport,
    private readonly host: HostReserve | null,
    /** Why the host's side can't be seen. */
    private readonly blind: string | null,
  ) {
    super();
    this.path = nameOf(target);
    this.source = new NbdExtents(added.nbd, () => this.disk.backing.length);
  }

  get format(): string {
    return this.disk.format;
  }

  get size(): number {
    return this.added.nbd.size;
  }

  get granularity(): number {
    return this.disk.clusterSize;
  }

  /** What a check finds out shows in it at once. */
  protected forJob(): JobImage {
    // eslint-disable-next-line @typescript-eslint/no-this-alias -- for the getters
    const image = this;
    return {
      ...this.named,
      source: this.source,
      get facts() {
        return image.planFacts();
      },
      storage: this.host,
      liveness: ALWAYS_LIVE,
      exact: true,
      get noGuarantee() {
        return image.whyNoGuarantee();
      },
      get warnings() {
        return image.findWarnings();
      },
      check: (request) => this.check(request),
      route: (name, request) => routeOf(mechanismOf(name), this.context(request)),
      passOf: (name, request) =>
        name === 'reserve' && this.host && this.reserve
          ? this.host.pass(this.reserve.range, request)
          : null,
    };
  }

  private planFacts(): PlanFacts {
    return {
      path: this.path,
      kind: 'guest',
      abilities: { fallocate: false, unshare: false },
      backed: this.disk.backing.length > 0,
      subclusters: this.disk.subclusters,
      unreserved: this.reserve?.missing ?? null,
    };
  }

  private whyNoGuarantee(): string | null {
    if (!this.host) return this.blind;
    if (!this.reserve) return 'its tables can’t be made out while the guest runs';
    const { noGuarantee, type } = this.host.filesystem;
    if (noGuarantee || !this.reserve.zeroes) return noGuarantee;
    return `where clusters are zeros, QEMU zeroes what is around a write, for which ${type} may need new blocks`;
  }

  private findWarnings(): string[] {
    const warnings = [...this.remarks];
    if (this.reserve) {
      warnings.push('a guest’s discard gives blocks back where the disk has discard=unmap, which QEMU does not tell');
    }
    return warnings;
  }

  /** All that QEMU holds in memory must be on the disk before the tables are read. */
  private async lookAtHost(): Promise<void> {
    if (!this.host) return;
    await this.added.nbd.flush();
    const found = await this.host.find();
    this.reserve = found && { ...found, missing: await this.host.missing(found.range) };
  }

  private context(request: RouteRequest): GuestContext {
    const { client, granularity, added, disk } = this;
    return { ...request, client, node: disk.node, nbd: added.nbd, granularity };
  }

  /** QEMU may have changed the graph meanwhile: the facts are asked for anew. */
  private async refresh(): Promise<void> {
    this.throwIfClosed();
    this.disk = await findDisk(this.client, this.target.device);
  }

  private async check(request: AllocationRequest): Promise<void> {
    await this.refresh();
    if (this.disk.readOnly) throw diskErrors.readOnly(this.path);
    if ((request.preallocation ?? 'falloc') === 'falloc') await this.lookAtHost();
    // At its end a stream drops the backing file, asked to or not.
    if (!request.dropBacking && request.route !== 'stream') return;
    const { offset = 0, length = this.size } = request;
    if (offset !== 0 || length < this.size) throw diskErrors.shortBacking(this.path);
    const { snapshots, backing } = this.disk;
    if (snapshots > 0 && backing.length > 0) throw diskErrors.hasSnapshots(this.path, snapshots);
  }

  override async detach(request: AllocationRequest = {}): Promise<DetachedResult> {
    const { route = 'stream', dropBacking } = request;
    if (route !== 'stream') throw diskErrors.detachedOnly(this.path);
    const plan = await this.dryRun({ ...request, route, dropBacking: dropBacking ?? true });
    if (plan.plan.length === 0) throw diskErrors.nothingToStream(this.path);
    const job = await startDetachedStream(this.client, {
      device: this.disk.node,
      jobId: detachedName(),
      speed: request.speed,
    });
    return { ...plan, job, warnings: [...plan.warnings, DETACHED] };
  }

  async info(): Promise<ImageInfo> {
    await this.refresh();
    await this.lookAtHost();
    const image = this.forJob();
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(image, { range, level: 'metadata' });
    const { disk } = this;
    return this.infoWith({
      hostAllocated: disk.image['actual-size'] ?? null,
      allocated: survey.met,
      missing: survey.missing,
      needed: { metadata: survey.needed, falloc: this.reserve?.missing ?? null, full: null },
      inUse: { by: `QEMU (pid ${this.client.peerPid() ?? 'unknown'})`, locks: [] },
      backing: disk.backing,
      snapshots: disk.snapshots,
      warnings: image.warnings,
    });
  }

  protected async release(): Promise<void> {
    try {
      await this.added[Symbol.asyncDispose]();
    } finally {
      await this.client.close();
      await this.host?.close();
    }
  }
}

function mechanismOf(name: RouteName): Mechanism<GuestContext> {
  const mechanism = MECHANISMS[name];
  if (!mechanism) throw new Error(`no mechanism for ${name}`);
  return mechanism;
}
