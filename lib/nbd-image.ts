/** An export of an NBD server, taken as the raw disk that its clients see. */
import { ExportExtents } from './export-extents.js';
import { UnknownExtents } from './extent-source.js';
import { formatOf, PROBE_LENGTH, requireRaw, type Format } from './format.js';
import { Image, rawStorage } from './image.js';
import { planFor, type JobImage } from './job-image.js';
import { NEVER_LIVE } from './liveness.js';
import { BASE_ALLOCATION, NbdClient, type TlsOptions } from './nbd/client.js';
import { roundUp } from './range.js';
import { nbdWriteRoute, tells } from './routes/nbd-write.js';
import { routeOf, type Route, type RouteRequest } from './routes/route.js';
import type { ImageInfo } from './types.js';

export interface NbdOptions {
  /** What the export's bytes are; `raw` unless it looks like something else. */
  format?: string;
  /** Instead of what a `nbds` URI says, or beside it. */
  tls?: TlsOptions | true;
  /** Where the URI names none. */
  tlsCertificates?: string;
}

/** Larger units are what a server likes best, not what it has storage in. */
const MOST_UNIT = 2 ** 20;
/** Reads and writes take turns, so that each direction has sixteen under way. */
const IN_FLIGHT = 32;
const LEAVE_MS = 2_000;

/** Throws what NbdClient throws: NBD_LOST, NBD_REFUSED, NBD_TLS, …, USAGE, RANGE. */
export async function openNbd(uri: string, { format, tls, tlsCertificates }: NbdOptions = {}): Promise<Image> {
  const nbd = await NbdClient.connect(uri, {
    metaContexts: [BASE_ALLOCATION],
    maxInFlight: IN_FLIGHT,
    ...(tls && { tls }),
    tlsCertificates,
  });
  try {
    const length = Math.min(nbd.size, roundUp(PROBE_LENGTH, nbd.blockSize.minimum));
    const head = length > 0 ? await nbd.read(0, length) : Buffer.alloc(0);
    // No suffix speaks for an export: its name is the server's.
    return new NbdImage(uri, nbd, formatOf('', head, format));
  } catch (error) {
    nbd.destroy();
    throw error;
  }
}

class NbdImage extends Image {
  readonly kind = 'nbd';
  readonly format: string;
  readonly formatBy: Format['by'];
  readonly size: number;
  readonly granularity: number;
  private readonly source: ExportExtents;
  /** Whether holes were given storage by now: by WRITE_ZEROES, or by zeros as data. */
  private did: 'nothing' | 'told' | 'wrote' = 'nothing';

  constructor(
    readonly path: string,
    private readonly nbd: NbdClient,
    private readonly probed: Format,
  ) {
    super();
    const { minimum, preferred } = nbd.blockSize;
    this.format = probed.name;
    this.formatBy = probed.by;
    this.size = nbd.size;
    this.granularity = Math.max(minimum, Math.min(preferred, MOST_UNIT));
    this.source = new ExportExtents(nbd);
  }

  /** The route by name means: whatever the map says, all that reads as zero. */
  protected forJob(): JobImage {
    // eslint-disable-next-line @typescript-eslint/no-this-alias -- for the getters
    const image = this;
    let bytesAlone = false;
    const unknown = new UnknownExtents();
    return {
      ...this.named,
      get source() {
        return bytesAlone ? unknown : image.source;
      },
      facts: {
        path: this.path,
        kind: 'nbd',
        abilities: { fallocate: this.nbd.flags.writeZeroes, unshare: false },
      },
      storage: null,
      liveness: NEVER_LIVE,
      get exact() {
        return !bytesAlone && image.mapTells;
      },
      noGuarantee: 'only the server of an export knows its storage, and it may call allocated what it can’t tell',
      get warnings() {
        return image.findWarnings();
      },
      check: (request) => {
        bytesAlone = request.route === 'nbd-write';
        return this.check();
      },
      route: (_name, request) => this.route(request),
    };
  }

  private route(request: RouteRequest): Route {
    const { path, nbd } = this;
    this.did = tells({ ...request, nbd }) ? 'told' : 'wrote';
    return routeOf(nbdWriteRoute, { ...request, path, nbd });
  }

  // eslint-disable-next-line @typescript-eslint/require-await -- the interface is asynchronous
  private async check(): Promise<void> {
    this.throwIfClosed();
    requireRaw(this.path, this.probed, 'file');
  }

  /** A server that has allocated may go on calling it a hole: with SEEK_HOLE, reserved is none. */
  private get mapTells(): boolean {
    const { tells, holes } = this.source;
    return tells && !(this.did === 'told' && holes !== 0);
  }

  async info(): Promise<ImageInfo> {
    const range = { offset: 0, length: this.size };
    const { survey } = await planFor(this.forJob(), { range, level: 'falloc' });
    return this.infoWith({
      ...(this.mapTells && rawStorage(survey)),
      warnings: [...this.findWarnings(), 'NBD has no lock: whether another client uses the export can’t be told'],
    });
  }

  private findWarnings(): string[] {
    const { flags } = this.nbd;
    const { mapped, tells, holes } = this.source;
    const warnings = [...this.remarks];
    if (this.format !== 'raw') {
      warnings.push(`the export looks like ${this.format}: what is told here is of its bytes themselves`);
    }
    if (flags.readOnly) warnings.push('the export is read-only: nothing can be allocated through it');
    if (!flags.readOnly && !flags.flush) {
      warnings.push('the server has no flush: whether what it answered for is durable can’t be told');
    }
    if (!mapped) warnings.push('the server has no map (base:allocation): what has storage can’t be told from here');
    if (mapped && holes === 0 && !tells) {
      warnings.push('the server’s map shows no hole, as of one that can’t tell; --route nbd-write goes by what is read');
    }
    if (holes) warnings.push(...this.holesLeft(holes));
    return warnings;
  }

  private holesLeft(holes: number): string[] {
    const calls = `the server’s map still calls ${holes} bytes holes`;
    if (this.did === 'told') {
      return [`${calls} after it was told to allocate them; --preallocation full writes zeros there instead`];
    }
    return this.did === 'wrote' ? [`${calls} after zeros were written there: it keeps no zeros`] : [];
  }

  /** A request that nobody waits for any more may never be answered. */
  protected async release(): Promise<void> {
    const timer = setTimeout(() => this.nbd.destroy(), LEAVE_MS);
    await this.nbd.disconnect();
    clearTimeout(timer);
  }
}
