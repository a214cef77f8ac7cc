/** A disk that a running QEMU has open: what it is, and how QEMU is had to allocate it. */
import { errors } from '../errors.js';
import { openFile, type OpenOptions } from '../file-image.js';
import { Image } from '../image.js';
import type { JobImage } from '../job-image.js';
import { planFor } from '../job-image.js';
import { ALWAYS_LIVE } from '../liveness.js';
import { startDetachedStream } from '../qmp/block-jobs.js';
import { QmpClient } from '../qmp/client.js';
import { populateRoute, type GuestContext } from '../routes/populate.js';
import { routeOf, type Mechanism, type RouteRequest } from '../routes/route.js';
import { streamRoute } from '../routes/stream.js';
import { nameOf, type GuestTarget } from '../target.js';
import type { AllocationRequest, DetachedResult, ImageInfo, RouteName } from '../types.js';
import { findDisk, type GuestDisk } from './disks.js';
import { diskErrors } from './errors.js';
import { openHostFile } from './host-file.js';
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
    const added = await NodeExport.add(client, disk.node, options.nbd);
    return new GuestImage(client, disk, target, added);
  } catch (error) {
    await client.close();
    throw error;
  }
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

  constructor(
    private readonly client: QmpClient,
    private disk: GuestDisk,
    private readonly target: GuestTarget,
    private readonly added: NodeExport,
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

  protected forJob(): JobImage {
    const { disk } = this;
    const isBacked = () => this.disk.backing.length > 0;
    return {
      path: this.path,
      format: disk.format,
      size: this.size,
      granularity: disk.clusterSize,
      source: this.source,
      facts: {
        path: this.path,
        kind: 'guest',
        abilities: { fallocate: false, unshare: false },
        // A run that drops the backing file looks again at its end.
        get backed() {
          return isBacked();
        },
        subclusters: disk.subclusters,
        unreserved: null,
      },
      storage: null,
      liveness: ALWAYS_LIVE,
      exact: true,
      noGuarantee: `host blocks of a ${disk.format} image in use are not reserved yet`,
      warnings: [],
      check: (request) => this.check(request),
      route: (name, request) => routeOf(mechanismOf(name), this.context(request)),
    };
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
    const image = this.forJob();
    const { survey } = await planFor(image, {
      range: { offset: 0, length: this.size },
      level: 'metadata',
    });
    const { disk } = this;
    return {
      target: this.path,
      kind: this.kind,
      format: disk.format,
      formatBy: this.formatBy,
      virtualSize: this.size,
      fileSize: null,
      hostAllocated: disk.image['actual-size'] ?? null,
      allocated: survey.met,
      missing: survey.missing,
      needed: { metadata: survey.needed, falloc: null, full: null },
      granularity: this.granularity,
      inUse: { by: `QEMU (pid ${this.client.peerPid() ?? 'unknown'})`, locks: [] },
      filesystem: null,
      backing: disk.backing,
      snapshots: disk.snapshots,
      warnings: image.warnings,
    };
  }

  protected async release(): Promise<void> {
    try {
      await this.added[Symbol.asyncDispose]();
    } finally {
      await this.client.close();
    }
  }
}

function mechanismOf(name: RouteName): Mechanism<GuestContext> {
  const mechanism = MECHANISMS[name];
  if (!mechanism) throw new Error(`no mechanism for ${name}`);
  return mechanism;
}
