/** A storage daemon that has a chain open, and an export of its top. */
import type { Chain } from '../chain/chain.js';
import { ThickenError } from '../errors.js';
import { addChain, nodeOf, type ChainAccess } from './chain-nodes.js';
import { NodeExport } from './node-export.js';
import { StorageDaemon } from './storage-daemon.js';

export class RestEngine implements AsyncDisposable {
  private constructor(
    readonly daemon: StorageDaemon,
    readonly added: NodeExport,
    /** Whether somebody else had the image open, so that what is read of it may be behind. */
    readonly shared: boolean,
  ) {}

  /**
   * For looking, from one of the layers down: read-only, and passing over the locks of others if need
   * be. Throws what StorageDaemon and NodeExport throw, and BACKING_MISSING.
   */
  static async look(chain: Chain, first: number): Promise<RestEngine> {
    try {
      return await RestEngine.start(chain, { first, write: false, share: false });
    } catch (error) {
      if (!(error instanceof ThickenError) || error.code !== 'IN_USE') throw error;
      return RestEngine.start(chain, { first, write: false, share: true });
    }
  }

  /** For changing the image; by writes of ours only if its export is `writable`. Its locks keep other QEMUs out. Throws also IN_USE. */
  static work(chain: Chain, writable = false): Promise<RestEngine> {
    return RestEngine.start(chain, { first: 0, write: true, share: false }, writable);
  }

  private static async start(chain: Chain, access: ChainAccess, writable = false): Promise<RestEngine> {
    const daemon = await StorageDaemon.start();
    try {
      await addChain(daemon, chain, access);
      const added = await NodeExport.on(daemon.server, daemon.qmp, nodeOf(access.first), writable);
      return new RestEngine(daemon, added, access.share);
    } catch (error) {
      const told = await daemon.explain(error, chain.top.path);
      await daemon[Symbol.asyncDispose]();
      throw told;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // The daemon's end is that of the export, too; the daemon still writes what it holds.
    this.added.nbd.destroy();
    await this.daemon[Symbol.asyncDispose]();
  }
}
