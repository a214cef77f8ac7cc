/** An export of one node, added and removed by us, with a client connected to it. */
import { setTimeout as sleep } from 'node:timers/promises';
import { ThickenError } from '../errors.js';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, NbdClient } from '../nbd/client.js';
import type { Limits } from '../nbd/connection.js';
import type { QmpClient } from '../qmp/client.js';
import { steer } from '../qmp/job-control.js';
import { sampleJobs } from '../qmp/job-sample.js';
import { diskErrors } from './errors.js';
import { isGone, isNotRunning, useNbdServer, withMonitor, type NbdServer } from './nbd-server.js';
import { giveUp, isAbandoned, ownName } from './owner.js';

const CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH];
/**
 * QEMU closes an export in the background, once its requests have ended, which a slow template holds
 * up. To stop the server before that would hold up QEMU's main loop (nbd_server_free), and with it
 * the guest: an export that does not go in this time stays, and so does the server.
 */
const LOOKS = 500;
const LOOK_MS = 20;

export interface ExportOptions {
  writable?: boolean;
  /** Of what is asked of it at a time. */
  limits?: Partial<Limits>;
}

export class NodeExport implements AsyncDisposable {
  private constructor(
    private readonly client: QmpClient,
    private readonly server: NbdServer,
    private readonly id: string,
    readonly nbd: NbdClient,
  ) {}

  /**
   * Exports a node for reading, with the depth of each allocation; on the server that runs at the
   * address `uri`, or one of our own. Throws NBD_BUSY, UNSUPPORTED, and what QmpClient and NbdClient
   * throw; nothing is left behind then.
   */
  static async add(client: QmpClient, node: string, uri?: string): Promise<NodeExport> {
    await checkAbilities(client);
    await removeAbandoned(client);
    return NodeExport.on(await useNbdServer(client, uri), client, node);
  }

  /** The same on a server that is there, in a QEMU that is ours alone. */
  static async on(server: NbdServer, client: QmpClient, node: string, how: ExportOptions = {}): Promise<NodeExport> {
    const { writable = false, limits } = how;
    const id = ownName();
    try {
      await client.execute('block-export-add', {
        type: 'nbd', id, 'node-name': node, name: id, writable, 'allocation-depth': true,
      });
      return new NodeExport(client, server, id, await connectTo(server, id, client.name, limits));
    } catch (error) {
      await takeAway(client, server, id).catch(() => undefined);
      throw isNotRunning(error) ? diskErrors.notRunning(client.name) : error;
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await takeAway(this.client, this.server, this.id, this.nbd);
  }
}

/**
 * The export goes first, and so QEMU closes the connection, in its main thread. One that we close
 * is noticed in the thread of the disk, and ended a QEMU whose disk has an iothread (7.2.22).
 */
async function takeAway(
  client: QmpClient,
  server: NbdServer,
  id: string,
  nbd?: NbdClient,
): Promise<void> {
  let gone = false;
  let reached = false;
  try {
    reached = await withMonitor(client, async (monitor) => {
      // Whoever started a job lost sight of it with the connection.
      if (monitor !== client) await cancelJobs(monitor, (job) => job === id);
      gone = await removeExport(monitor, id);
      if (!gone) return;
      await nbd?.disconnect();
      await server.end(monitor);
    });
  } finally {
    nbd?.destroy();
    if (!gone || !reached) {
      giveUp(id);
      await server.outlive();
    }
  }
}

async function checkAbilities(client: QmpClient): Promise<void> {
  // The command and its `allocation-depth` came together.
  const has = await client.supports('block-export-add');
  if (!has) throw diskErrors.unsupportedHere(client.name, 'this QEMU tells no allocation depth over NBD (5.2 does)');
}

async function connectTo(
  { address, uri }: NbdServer,
  id: string,
  monitor: string,
  limits: Partial<Limits> = {},
): Promise<NbdClient> {
  let nbd: NbdClient;
  try {
    nbd = await NbdClient.connect(address, { exportName: id, metaContexts: CONTEXTS, ...limits });
  } catch (error) {
    const refused = error instanceof ThickenError && error.code === 'NBD_REFUSED';
    throw uri && refused ? diskErrors.noServer(monitor, error.message) : error;
  }
  if (nbd.contexts.length === CONTEXTS.length && nbd.flags.cache) return nbd;
  await nbd.disconnect();
  // Another server may have an export by any name, as nbdkit does.
  if (uri) throw diskErrors.noServer(monitor, 'it lacks CACHE or QEMU’s meta contexts');
  throw diskErrors.unsupportedHere(monitor, 'QEMU’s NBD server lacks CACHE, or its meta contexts');
}

/** Whether it is gone. Hard: a client that has not said goodbye does not hold it up. */
async function removeExport(client: QmpClient, id: string): Promise<boolean> {
  try {
    await client.execute('block-export-del', { id, mode: 'hard' }).catch((error: unknown) => {
      // Somebody else removes it, or has; the look tells.
      if (!isRefusal(error)) throw error;
    });
    for (let i = 0; i < LOOKS; i++) {
      const left = await client.execute('query-block-exports');
      if (!left.some((entry) => entry.id === id)) return true;
      await sleep(LOOK_MS);
    }
    return false;
  } catch (error) {
    // It goes with QEMU.
    if (isGone(error)) return true;
    throw error;
  }
}

function isRefusal(error: unknown): boolean {
  return error instanceof ThickenError && error.code === 'QMP_COMMAND';
}

/** What a killed run left. */
export async function removeAbandoned(client: QmpClient): Promise<void> {
  await cancelJobs(client, isAbandoned);
  const exports = await client.execute('query-block-exports');
  for (const { id } of exports.filter((entry) => isAbandoned(entry.id))) {
    if (!(await removeExport(client, id))) throw diskErrors.stillServed(client.name, id);
  }
  const nodes = await client.execute('query-named-block-nodes', { flat: true });
  for (const { 'node-name': name = '' } of nodes) {
    if (isAbandoned(name)) await client.execute('blockdev-del', { 'node-name': name }).catch(() => undefined);
  }
}

async function cancelJobs(client: QmpClient, ours: (id: string) => boolean): Promise<void> {
  for (const { id } of await sampleJobs(client)) {
    if (ours(id)) await steer(client, id, 'cancel').catch(() => undefined);
  }
}

/**
 * The error to tell where the export's connection broke: it is the first to show that QEMU is gone,
 * which the monitor's tells better.
 */
export async function explainLoss(client: QmpClient, error: unknown): Promise<unknown> {
  if (!(error instanceof ThickenError) || error.code !== 'NBD_LOST') return error;
  const said: unknown = await client.executeAny('query-name').catch((reason: unknown) => reason);
  if (said instanceof ThickenError && said.code === 'QMP_LOST') return said;
  return diskErrors.exportGone(client.name, error);
}
