/** What an image at rest lies on, opened by the caller's word, and how the storage daemon deals with it. */
import { Chain, type ChainOptions, type Layer } from '../chain/chain.js';
import { chainErrors } from '../chain/errors.js';
import { placed } from '../chain/places.js';
import type { Descriptor } from '../descriptor.js';
import type { ExtentPage } from '../extent.js';
import type { ExtentSource } from '../extent-source.js';
import type { OpenOptions } from '../open-options.js';
import { populateRoute, type GuestContext } from '../routes/populate.js';
import { nbdRewriteRoute, nbdTouchRoute } from '../routes/nbd-touch.js';
import type { Mechanism, Route, RouteRequest } from '../routes/route.js';
import { streamRoute } from '../routes/stream.js';
import { Secret } from '../secret.js';
import type { AllocationRequest, ByteRange, ImageInfo, RouteName } from '../types.js';
import { diskErrors } from './errors.js';
import { nodeOf } from './chain-nodes.js';
import { restRoute } from './rest-route.js';
import { RestSource } from './rest-source.js';

const MECHANISMS: Partial<Record<RouteName, Mechanism<GuestContext>>> = {
  populate: populateRoute,
  'nbd-write': nbdTouchRoute,
  stream: streamRoute,
};

type BackingOptions = Pick<OpenOptions, 'backingFormat' | 'tlsCertificates' | 'secret'>;

export class Backing implements AsyncDisposable {
  private readonly source: RestSource;

  private constructor(
    private readonly file: Descriptor,
    private current: Chain,
    first: 0 | 1,
    private readonly options: ChainOptions,
  ) {
    this.source = new RestSource(() => this.current, first);
  }

  /**
   * Of an image in a format that the caller has stated; `file` stays the caller's. `first` 0: its map
   * has the image, too; 1: only what lies below, for an image whose own tables somebody else reads.
   * Throws what Chain.open and Secret.read throw.
   */
  static async open(file: Descriptor, format: string, first: 0 | 1, options: BackingOptions = {}): Promise<Backing> {
    const { backingFormat, tlsCertificates } = options;
    const secret = options.secret === undefined ? null : await Secret.read(options.secret);
    const wanted = { backingFormat, tlsCertificates, secret };
    try {
      return new Backing(file, await Chain.open(file, format, wanted), first, wanted);
    } catch (error) {
      secret?.[Symbol.dispose]();
      throw error;
    }
  }

  get chain(): Chain {
    return this.current;
  }

  get layers(): readonly Layer[] {
    return this.current.below;
  }

  /** Which layer has what, and whether that reads as zeros. */
  get extents(): ExtentSource {
    return this.source;
  }

  /** The same again, with the places of what lies below. */
  placed(pages: AsyncIterable<ExtentPage>, range: ByteRange): AsyncGenerator<ExtentPage, void, undefined> {
    return placed(pages, this.current, range, async (depth) => (await this.sizes()).get(nodeOf(depth)) ?? 0);
  }

  /** Looks at headers and layers anew: somebody else may have changed them since. */
  async refresh(): Promise<void> {
    await this.source.letGo();
    const fresh = await Chain.open(this.file, this.current.top.format, this.options);
    const old = this.current;
    this.current = fresh;
    await old[Symbol.asyncDispose]();
  }

  /** The image as the daemon has it; bytes. */
  async node(): Promise<{ size: number; clusterSize: number | null }> {
    const { daemon } = await this.source.engine();
    const nodes = await daemon.qmp.execute('query-named-block-nodes', { flat: true });
    const top = nodes.find((node) => node['node-name'] === nodeOf(0))?.image;
    return { size: top?.['virtual-size'] ?? 0, clusterSize: top?.['cluster-size'] ?? null };
  }

  /** Ends the daemon that reads; the next look starts another one. */
  letGo(): Promise<void> {
    return this.source.letGo();
  }

  /** Whether the image or what it lies on is encrypted. */
  get needsKey(): boolean {
    return this.current.layers.some(({ header }) => header?.encryption);
  }

  /** Throws SECRET_REQUIRED where the image itself can't be written to for want of its key. */
  checkKey(): void {
    const { top, secret } = this.current;
    if (top.header?.encryption && !secret) throw chainErrors.secretWanted(top.path);
  }

  /** Throws RANGE or HAS_SNAPSHOTS where the request would free the image from what it lies on, and can't. */
  checkDrop({ dropBacking, route, offset = 0, length }: AllocationRequest, size: number, snapshots: number): void {
    if (!dropBacking && route !== 'stream') return;
    const { path } = this.file;
    if (offset !== 0 || (length ?? size) < size) throw diskErrors.shortBacking(path);
    if (snapshots > 0 && this.layers.length > 0) throw diskErrors.hasSnapshots(path, snapshots);
  }

  /** `populate`, `nbd-write` or `stream`. Once it is through, `after` is told: the image has been changed. */
  route(name: RouteName, request: RouteRequest, granularity: number, after?: () => Promise<void>): Route {
    const rewrites = name === 'nbd-write' && this.layers.length > 0;
    const mechanism = rewrites ? nbdRewriteRoute : MECHANISMS[name];
    if (!mechanism) throw new Error(`no mechanism for ${name}`);
    return restRoute(mechanism, {
      ...request,
      granularity,
      chain: () => this.current,
      letGo: () => this.source.letGo(),
      after: after ?? (() => Promise.resolve()),
    });
  }

  warningsFor(size: number): string[] {
    const warnings = this.source.shared ? ['somebody else has it open, too: what is told of it may be behind'] : [];
    for (const { path, virtualSize } of this.layers) {
      if (virtualSize === null || virtualSize >= size) continue;
      warnings.push(`${path} is smaller than the image: what lies past its end reads as zeros`);
    }
    return warnings;
  }

  /** Bytes of each layer, by its node. */
  private async sizes(): Promise<Map<string | undefined, number>> {
    const { daemon } = await this.source.engine();
    const nodes = await daemon.qmp.execute('query-named-block-nodes', { flat: true });
    return new Map(nodes.map((node) => [node['node-name'], node.image['virtual-size']]));
  }

  /** The layers, with how much of the image's content comes from each; `bytes`: by depth. */
  async info(bytes: readonly number[]): Promise<ImageInfo['backing']> {
    const sizes = await this.sizes();
    return this.layers.map(({ path, format, virtualSize }, i) => ({
      path,
      format,
      virtualSize: virtualSize ?? sizes.get(nodeOf(i + 1)) ?? null,
      allocated: bytes[i + 1] ?? 0,
    }));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.source.letGo();
    await this.current[Symbol.asyncDispose]();
    this.options.secret?.[Symbol.dispose]();
  }
}
