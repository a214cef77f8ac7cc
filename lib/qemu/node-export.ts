/** An export of one node, added and removed by us, with a client connected to it. */
import { setTimeout as sleep } from 'node:timers/promises';
import { ThickenError } from '../errors.js';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, NbdClient } from '../nbd/client.js';
import type { QmpClient } from '../qmp/client.js';
import { steer } from '../qmp/job-control.js';
import { sampleJobs } from '../qmp/job-sample.js';
import { diskErrors } from './errors.js';
import { isGone, useNbdServer, type NbdServer } from './nbd-server.js';
import { isAbandoned, ownName } from './owner.js';

const CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH];
/** QEMU closes an export in the background. */
const LOOKS = 100;
const LOOK_MS = 20;

export class NodeExport implements AsyncDisposable {
  private constructor(
    private readonly client: QmpClient,
    private readonly server: NbdServer,
    private readonly id: string,
    readonly nbd: NbdClient,
  ) {}

  /**
   * Exports a node for reading, with the depth of each allocation. Throws NBD_BUSY, UNSUPPORTED, and
   * what QmpClient and NbdClient throw; nothing is left behind then.
   */
  static async add(client: QmpClient, node: string, uri?: string): Promise<NodeExport> {
    await checkAbilities(client);
    await removeAbandoned(client);
    const server = await useNbdServer(client, uri);
    const id = ownName();
    try {
      await client.execute('block-export-add', {
        type: 'nbd', id, 'node-name': node, name: id, writable: false, 'allocation-depth': true,
      });
      return new NodeExport(client, server, id, await connectTo(server, id, client));
    } catch (error) {
      await server[Symbol.asyncDispose]().catch(() => undefined);
      throw error;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await leave(this.client, this.id, this.nbd);
    } finally {
      await this.server[Symbol.asyncDispose]();
    }
  }
}

async function checkAbilities(client: QmpClient): Promise<void> {
  const has = await client.supportsArgument('block-export-add', 'allocation-depth');
  if (!has) throw diskErrors.unsupportedHere(client.name, 'this QEMU tells no allocation depth over NBD (5.2 does)');
}

async function connectTo({ address, uri }: NbdServer, id: string, client: QmpClient): Promise<NbdClient> {
  let nbd: NbdClient | undefined;
  try {
    nbd = await NbdClient.connect(address, { exportName: id, metaContexts: CONTEXTS });
    if (nbd.contexts.length === CONTEXTS.length && nbd.flags.cache) return nbd;
    throw diskErrors.unsupportedHere(client.name, 'QEMU’s NBD server lacks CACHE, or its meta contexts');
  } catch (error) {
    await leave(client, id, nbd);
    const refused = error instanceof ThickenError && error.code === 'NBD_REFUSED';
    throw uri && refused ? diskErrors.noServer(client.name, error.message) : error;
  }
}

/**
 * The export goes first, and so QEMU closes the connection, in its main thread. One that we close
 * is noticed in the thread of the disk: with an iothread, QEMU ends there by an assertion (7.2.22,
 * nbd_blockdev_client_closed).
 */
async function leave(client: QmpClient, id: string, nbd: NbdClient | undefined): Promise<void> {
  try {
    await removeExport(client, id);
  } finally {
    await nbd?.disconnect();
  }
}

/** Hard: a client that has not said goodbye does not hold it up. */
async function removeExport(client: QmpClient, id: string): Promise<void> {
  try {
    await client.execute('block-export-del', { id, mode: 'hard' });
    for (let i = 0; i < LOOKS; i++) {
      const left = await client.execute('query-block-exports');
      if (!left.some((entry) => entry.id === id)) return;
      await sleep(LOOK_MS);
    }
  } catch (error) {
    // It goes with its node, or with QEMU.
    if (!isGone(error)) throw error;
  }
}

/** What a killed run left. */
export async function removeAbandoned(client: QmpClient): Promise<void> {
  for (const { id } of await sampleJobs(client)) {
    if (isAbandoned(id)) await steer(client, id, 'cancel').catch(() => undefined);
  }
  const exports = await client.execute('query-block-exports');
  for (const { id } of exports) if (isAbandoned(id)) await removeExport(client, id);
  const nodes = await client.execute('query-named-block-nodes', { flat: true });
  for (const { 'node-name': name = '' } of nodes) {
    if (isAbandoned(name)) await client.execute('blockdev-del', { 'node-name': name }).catch(() => undefined);
  }
}
