/** QEMU's NBD server: started for us where none runs, and ended by us only if it is ours. */
import { chmod, chown, mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { connect } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { ThickenError } from '../errors.js';
import { native } from '../native.js';
import type { NbdAddress } from '../nbd/client.js';
import { parseNbdUri, type NbdUri } from '../nbd/uri.js';
import type { QmpClient } from '../qmp/client.js';
import { diskErrors } from './errors.js';
import { isAbandoned, ownName } from './owner.js';

const SOCKET = 'nbd.sock';

export interface NbdServer {
  /** The server of --nbd, with what its clients need. */
  readonly address: NbdAddress | string;
  readonly uri: NbdUri | null;
  [Symbol.asyncDispose](): Promise<void>;
}

/**
 * The server to add an export to: of our own on a socket in a private folder (0700, the socket
 * 0600), or that of `uri`. Throws NBD_BUSY where another one runs, and no `uri` tells its address.
 */
export async function useNbdServer(client: QmpClient, uri?: string): Promise<NbdServer> {
  if (uri !== undefined) return foreignServer(uri);
  await endAbandonedServers(client);
  const folder = await makeFolder(client.peerPid());
  const path = join(folder, SOCKET);
  try {
    const addr = { type: 'unix', data: { path } };
    await client.execute('nbd-server-start', { addr });
  } catch (error) {
    await rm(folder, { recursive: true, force: true });
    throw isRunning(error) ? diskErrors.nbdBusy(client.name) : error;
  }
  // QEMU made it by its own umask; until now the folder alone kept others out.
  await chmod(path, 0o600).catch(() => undefined);
  return {
    address: { socketPath: path },
    uri: null,
    [Symbol.asyncDispose]: () => endServer(client, folder),
  };
}

function foreignServer(text: string): NbdServer {
  const uri = parseNbdUri(text);
  return { address: text, uri, [Symbol.asyncDispose]: () => Promise.resolve() };
}

/** QEMU tells it in words alone ("NBD server already running"). */
function isRunning(error: unknown): boolean {
  return error instanceof ThickenError && /already running/i.test(error.message);
}

/** QEMU binds the socket, and may be another user. */
async function makeFolder(peer: number | null): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), `${ownName()}-`));
  await chmod(folder, 0o700);
  const user = peer === null ? null : await stat(`/proc/${peer}`).catch(() => null);
  if (user && user.uid !== process.getuid?.()) await chown(folder, user.uid, user.gid).catch(() => undefined);
  return folder;
}

async function endServer(client: QmpClient, folder: string): Promise<void> {
  try {
    await client.execute('nbd-server-stop');
  } catch (error) {
    // With QEMU gone, so is its server.
    if (!isGone(error)) throw error;
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

export function isGone(error: unknown): boolean {
  return (
    error instanceof ThickenError &&
    ['QMP_LOST', 'QMP_PROTOCOL', 'CLOSED', 'QMP_COMMAND'].includes(error.code)
  );
}

/** A killed run leaves its server running: known by its folder, and by who listens there. */
async function endAbandonedServers(client: QmpClient): Promise<void> {
  const names = await readdir(tmpdir()).catch(() => []);
  for (const name of names.filter(isAbandoned)) {
    const folder = join(tmpdir(), name);
    const listener = await listenerOf(join(folder, SOCKET));
    if (listener !== null && listener === client.peerPid()) {
      await client.execute('nbd-server-stop').catch(() => undefined);
    }
    // Nobody listens there any more, or the one who did was ours.
    if (listener === null || listener === client.peerPid()) {
      await rm(folder, { recursive: true, force: true }).catch(() => undefined);
    }
  }
}

/** The process that listens on a socket; null: none. */
function listenerOf(path: string): Promise<number | null> {
  return new Promise((resolve) => {
    const socket = connect({ path });
    const end = (pid: number | null) => {
      socket.destroy();
      resolve(pid);
    };
    socket.once('error', () => end(null));
    socket.once('connect', () => end(peerOf(socket)));
  });
}

function peerOf(socket: object): number | null {
  const fd = (socket as { _handle?: { fd?: number } })._handle?.fd;
  return typeof fd === 'number' && fd >= 0 ? native().peerCredentials(fd).pid || null : null;
}
