/** QEMU's storage daemon: the engine for disks at rest, for as long as a job lasts. */
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { ThickenError } from '../errors.js';
import { QmpClient } from '../qmp/client.js';
import type { NodeOptions } from '../qmp/commands.js';
import { socketTransport } from '../qmp/transport.js';
import type { Secret } from '../secret.js';
import { endAbandonedDaemons } from './daemon-folder.js';
import { DaemonProcess, MONITOR_SOCKET, NBD_SOCKET } from './daemon-process.js';
import { diskErrors } from './errors.js';
import type { NbdServer } from './nbd-server.js';
import { daemonFolderName } from './owner.js';

const START_MS = 30_000;

/** How a file may be opened, from the fastest on: not every file system has direct I/O. */
const FILE_OPTIONS = [
  { direct: true, aio: 'io_uring' },
  { direct: true, aio: 'native' },
  { direct: true, aio: 'threads' },
  { direct: false, aio: 'threads' },
];

export interface StartOptions {
  /** Cancels the start. */
  signal?: AbortSignal | undefined;
}

/**
 * A daemon of our own, on sockets in a private folder. It ends when this is disposed of, and when this
 * process ends in any way. Nothing is probed: every node is given with its driver, and those below it
 * by their names.
 */
export class StorageDaemon implements AsyncDisposable {
  /** For `NodeExport.on`: it runs from the start, and ends with the daemon. */
  readonly server: NbdServer;

  private constructor(
    private readonly process: DaemonProcess,
    /** Its monitor. */
    readonly qmp: QmpClient,
    folder: string,
  ) {
    const nothing = () => Promise.resolve();
    const address = { socketPath: join(folder, NBD_SOCKET) };
    this.server = { address, uri: null, end: nothing, outlive: nothing };
  }

  /**
   * Starts a daemon with `nodes`, in this order; first it ends those that killed thickens have left.
   * Throws DAEMON_MISSING, DAEMON_FAILED, CANCELLED, and what QmpClient throws; nothing is left then.
   */
  static async start(
    nodes: readonly NodeOptions[] = [],
    { signal }: StartOptions = {},
  ): Promise<StorageDaemon> {
    await endAbandonedDaemons();
    const folder = join(tmpdir(), daemonFolderName());
    const process = await DaemonProcess.start(folder);
    const daemon = new StorageDaemon(process, await connect(process, folder, signal), folder);
    try {
      for (const node of nodes) await daemon.addNode(node);
      return daemon;
    } catch (error) {
      await daemon[Symbol.asyncDispose]();
      throw error;
    }
  }

  async addNode(node: NodeOptions): Promise<void> {
    await this.qmp.execute('blockdev-add', node);
  }

  /**
   * A node of a file or device as it is, with direct I/O and io_uring where they work; `node` says
   * nothing of `cache` and `aio`.
   */
  async addFile(node: NodeOptions): Promise<void> {
    for (const [i, { direct, aio }] of FILE_OPTIONS.entries()) {
      try {
        return await this.addNode({ ...node, cache: { direct }, aio });
      } catch (error) {
        // Only words tell why, and they depend on the version: the last attempt's error is told.
        if (!isRefusal(error) || i === FILE_OPTIONS.length - 1) throw error;
      }
    }
  }

  /**
   * Lends the daemon a key by the name `id`, while `work` opens what it unlocks: an image that is open needs
   * it no more. It goes over the monitor's socket, which the daemon has inherited, and nowhere else.
   */
  async withSecret(id: string, secret: Secret, work: () => Promise<void>): Promise<void> {
    await this.qmp.execute('object-add', { 'qom-type': 'secret', id, format: 'base64', data: secret.base64 });
    try {
      await work();
    } finally {
      // A daemon that is lost has lost it, too.
      await this.qmp.execute('object-del', { id }).catch(() => undefined);
    }
  }

  /** What NBD nodes name as `tls-creds`: certificates in a folder, of our own and of who vouches for a server. */
  async addCertificates(id: string, dir: string): Promise<void> {
    await this.qmp.execute('object-add', { 'qom-type': 'tls-creds-x509', id, endpoint: 'client', dir, 'verify-peer': true });
  }

  /** Of a node that nothing uses any more. */
  async removeNode(name: string): Promise<void> {
    await this.qmp.execute('blockdev-del', { 'node-name': name });
  }

  /**
   * The error to tell where something failed in the daemon's hands: where it has ended, that is why.
   * `path` is that of the image.
   */
  async explain(error: unknown, path: string): Promise<unknown> {
    if (!isLoss(error)) return error;
    const how = await this.process.endedSoon();
    // With what was done by then, if the error carries that.
    return how === null ? error : diskErrors.daemonLost(path, how, this.process.said, error.cause ?? error);
  }

  /** Ends the daemon, in peace if it can: it writes what it holds in memory, and closes its images. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.process.end(() => this.qmp.executeAny('quit'));
    await this.qmp.close();
  }
}

/** What is seen of a daemon that has ended. */
const LOSSES = new Set(['QMP_LOST', 'QMP_PROTOCOL', 'NBD_LOST', 'CLOSED']);

function isLoss(error: unknown): error is ThickenError {
  return error instanceof ThickenError && LOSSES.has(error.code);
}

function isRefusal(error: unknown): boolean {
  return error instanceof ThickenError && error.code === 'QMP_COMMAND';
}

async function connect(process: DaemonProcess, folder: string, signal?: AbortSignal): Promise<QmpClient> {
  const transport = socketTransport(process.monitor, join(folder, MONITOR_SOCKET));
  try {
    return await QmpClient.connect(transport, { timeoutMs: START_MS, signal });
  } catch (error) {
    // A monitor that is lost is a daemon that ends; else its ending here would be told as its failure.
    const how = isLoss(error) ? await process.endedSoon() : null;
    await process.end();
    throw how === null ? error : diskErrors.daemonFailed(how, process.said, error);
  }
}
