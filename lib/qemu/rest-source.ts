/** The map of an image at rest and of what lies below it, by a storage daemon that is started for it. */
import type { Chain } from '../chain/chain.js';
import type { ExtentPage } from '../extent.js';
import type { ExtentSource } from '../extent-source.js';
import type { CancelFlag } from '../native.js';
import type { ByteRange } from '../types.js';
import { NbdExtents } from './nbd-extents.js';
import { RestEngine } from './rest-engine.js';

export class RestSource implements ExtentSource {
  readonly method = null;
  readonly filesystem = null;
  readonly file = null;
  private running: Promise<RestEngine> | undefined;
  /** Whether what was read last was read beside somebody who has the image open. */
  shared = false;

  constructor(private readonly chain: () => Chain) {}

  async *pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined> {
    const { added, daemon } = await this.engine();
    const extents = new NbdExtents(added.nbd, () => this.chain().below.length);
    try {
      yield* extents.pages(range, cancel);
    } catch (error) {
      throw await daemon.explain(error, this.chain().top.path);
    }
  }

  /** Started when it is first asked for; what is known of the image is as old as that. */
  async engine(): Promise<RestEngine> {
    this.running ??= RestEngine.look(this.chain()).catch((error: unknown) => {
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

  [Symbol.asyncDispose](): Promise<void> {
    return this.letGo();
  }
}
