/** A storage daemon that has a chain open, and an export of its top. */
import type { Chain } from '../chain/chain.js';
import type { Descriptor } from '../descriptor.js';
import { ThickenError } from '../errors.js';
import { keepUnchanged } from '../exclusive.js';
import { addChain, inUse, isLocked, nodeOf, type ChainAccess } from './chain-nodes.js';
import { NodeExport } from './node-export.js';
import { StorageDaemon } from './storage-daemon.js';

/** Several writes that allocate ended QEMU by an assertion of its own now and then (7.2, qed_aio_write_alloc). */
const ONE_AT_A_TIME = new Set(['qed']);

export class RestEngine implements AsyncDisposable {
  private constructor(
    readonly daemon: StorageDaemon,
    readonly added: NodeExport,
    /** Whether somebody else had the image open, so that what is read of it may be behind. */
    readonly shared: boolean,
    private readonly locks: Locks,
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

  /**
   * For changing the image; by writes of ours only if its export is `writable`. Its locks keep other
   * QEMUs out, and ours keep the layers below unchanged: an export alone would let them be written to.
   * Throws also IN_USE.
   */
  static async work(chain: Chain, writable = false): Promise<RestEngine> {
    const locks = await Locks.take(chain);
    try {
      return await RestEngine.start(chain, { first: 0, write: true, share: false }, writable, locks);
    } catch (error) {
      await locks.close();
      throw error;
    }
  }

  private static async start(
    chain: Chain,
    access: ChainAccess,
    writable = false,
    locks = new Locks(),
  ): Promise<RestEngine> {
    const daemon = await StorageDaemon.start();
    try {
      await addChain(daemon, chain, access);
      const added = await NodeExport.on(daemon.server, daemon.qmp, nodeOf(access.first), {
        writable,
        ...(ONE_AT_A_TIME.has(chain.top.format) && { limits: { maxInFlight: 1 } }),
      });
      return new RestEngine(daemon, added, access.share, locks);
    } catch (error) {
      const told = await daemon.explain(error, chain.top.path);
      await daemon[Symbol.asyncDispose]();
      // Only now: its own locks are gone.
      throw isLocked(told) ? await inUse(chain) : told;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // The daemon's end is that of the export, too; the daemon still writes what it holds.
    this.added.nbd.destroy();
    await this.daemon[Symbol.asyncDispose]();
    await this.locks.close();
  }
}

/** On the layers below an image. */
class Locks {
  private readonly held: Descriptor[] = [];

  static async take({ below }: Chain): Promise<Locks> {
    const locks = new Locks();
    try {
      for (const { source } of below) {
        if (source.kind !== 'nbd') locks.held.push(await keepUnchanged(source.file));
      }
      return locks;
    } catch (error) {
      await locks.close();
      throw error;
    }
  }

  async close(): Promise<void> {
    for (const lock of this.held) await lock.close();
  }
}
