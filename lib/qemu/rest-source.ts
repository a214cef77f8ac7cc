/** What lies behind an image at rest, layer by layer, by a storage daemon that is started for it. */
import type { Chain } from '../chain/chain.js';
import { ABSENT, type ExtentPage } from '../extent.js';
import { ToldExtents } from '../extent-source.js';
import type { CancelFlag } from '../native.js';
import { clip, endOf } from '../range.js';
import type { ByteRange } from '../types.js';
import { NbdExtents } from './nbd-extents.js';
import { RestEngine } from './rest-engine.js';

export class RestSource extends ToldExtents {
  private running: Promise<RestEngine> | undefined;
  /** Whether what was read last was read beside somebody who has a layer open for writing. */
  shared = false;

  constructor(
    private readonly chain: () => Chain,
    /** 0: the image and all below it; 1: only what is below it, the image not being opened. */
    private readonly first: 0 | 1,
  ) {
    super();
  }

  async *pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined> {
    const { added, daemon } = await this.engine();
    const below = this.chain().below.length;
    const extents = new NbdExtents(added.nbd, () => below, this.first);
    // What is below may be smaller than the image.
    const there = clip({ offset: 0, length: added.nbd.size }, range);
    try {
      if (there.length > 0) yield* extents.pages(there, cancel);
    } catch (error) {
      throw await daemon.explain(error, this.chain().top.path);
    }
    const end = Math.max(range.offset, endOf(there));
    if (end < endOf(range)) yield absentPage(end, endOf(range) - end, below);
  }

  /** Started when it is first asked for; what is known of the layers is as old as that. */
  async engine(): Promise<RestEngine> {
    this.running ??= RestEngine.look(this.chain(), this.first).catch((error: unknown) => {
      this.running = undefined;
      throw error;
    });
    const engine = await this.running;
    this.shared = engine.shared;
    return engine;
  }

  /** Ends the daemon, so that the image can be opened for writing, or is read afresh. */
  async letGo(): Promise<void> {
    const running = this.running;
    this.running = undefined;
    const engine = await running?.catch(() => undefined);
    await engine?.[Symbol.asyncDispose]();
  }

  override [Symbol.asyncDispose](): Promise<void> {
    return this.letGo();
  }
}

function absentPage(offset: number, length: number, depth: number): ExtentPage {
  return {
    offset: Float64Array.of(offset),
    length: Float64Array.of(length),
    state: Uint8Array.of(ABSENT),
    flags: Uint32Array.of(0),
    depth: Uint32Array.of(depth),
  };
}
