/** QEMU's NBD server: started for us where none runs, and ended by us only if it is ours. */
import { constants } from 'node:fs';
import { chmod, chown, lstat, mkdtemp, open, readdir, readFile, rename, rmdir, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import process from 'node:process';
import { setTimeout as sleep } from 'node:timers/promises';
import { ThickenError } from '../errors.js';
import type { NbdAddress } from '../nbd/client.js';
import { parseNbdUri, type NbdUri } from '../nbd/uri.js';
import { QmpClient } from '../qmp/client.js';
import { diskErrors } from './errors.js';
import { isListenedOn, listens } from './listener.js';
import { giveUp, isAbandoned, isDaemonFolder, ownName } from './owner.js';

const SOCKET = 'nbd.sock';
const RECONNECT_MS = 5_000;
/** A QEMU that quits closes its monitors first. */
const LAST_LOOKS = 100;
const LOOK_MS = 50;
/** open(2); Node has no name for it. The number is that of x86 and ARM. */
const O_PATH = 0o10000000;

export interface NbdServer {
  /** The server of --nbd, with what its clients need. */
  readonly address: NbdAddress | string;
  readonly uri: NbdUri | null;
  /** Ends a server of our own. Does nothing where QEMU is gone. */
  end(client: QmpClient): Promise<void>;
  /** For a QEMU that can't be reached: most likely it is about to end, and its server with it. */
  outlive(): Promise<void>;
}

/**
 * The server to add an export to: of our own on a socket in a private folder (0700, the socket
 * 0600), or that of `uri`. Throws NBD_BUSY where another one runs, and no `uri` tells its address.
 */
export async function useNbdServer(client: QmpClient, uri?: string): Promise<NbdServer> {
  if (uri !== undefined) return foreignServer(uri);
  await endAbandonedServers(client);
  const server = new OwnServer(await makeFolder(client.peerPid()));
  try {
    await server.start(client);
    return server;
  } catch (error) {
    await withMonitor(client, (monitor) => server.end(monitor)).catch(() => undefined);
    throw isRunning(error) ? diskErrors.nbdBusy(client.name) : error;
  }
}

function foreignServer(text: string): NbdServer {
  const uri = parseNbdUri(text);
  return { address: text, uri, end: () => Promise.resolve(), outlive: () => Promise.resolve() };
}

/**
 * Does something by `client`, and again by a connection of its own where that one is lost: with the
 * connection cut, QEMU would keep what was added to it. Tells whether QEMU was reached.
 */
export async function withMonitor(
  client: QmpClient,
  act: (client: QmpClient) => Promise<void>,
): Promise<boolean> {
  await act(client);
  if (client.state !== 'lost') return true;
  const another = await QmpClient.connect(client.name, { timeoutMs: RECONNECT_MS }).catch(() => null);
  if (!another) return false;
  try {
    await act(another);
    return another.state !== 'lost';
  } finally {
    await another.close();
  }
}

class OwnServer implements NbdServer {
  readonly uri = null;
  readonly address: { socketPath: string };
  private started = false;
  private visible = false;

  constructor(private readonly folder: string) {
    this.address = { socketPath: join(folder, SOCKET) };
  }

  async start(client: QmpClient): Promise<void> {
    const { socketPath: path } = this.address;
    await client.execute('nbd-server-start', { addr: { type: 'unix', data: { path } } });
    this.started = true;
    // QEMU made it by its own umask; until now the folder alone kept others out.
    this.visible = await makePrivate(path).catch(() => false);
  }

  async end(client: QmpClient): Promise<void> {
    try {
      if (await this.runs()) await client.execute('nbd-server-stop');
    } catch (error) {
      // With QEMU gone, so is its server.
      if (!isGone(error)) throw error;
    } finally {
      await removeFolder(this.folder);
    }
  }

  async outlive(): Promise<void> {
    for (let looks = 0; looks < LAST_LOOKS; looks++) {
      if (!(await isListenedOn(this.address.socketPath))) break;
      await sleep(LOOK_MS);
    }
    await removeFolder(this.folder);
  }

  /** Somebody may have put a server of theirs in the place of ours; then QEMU removed our socket. */
  private async runs(): Promise<boolean> {
    if (await exists(this.address.socketPath)) return true;
    // A socket that never was to be seen from here was made where QEMU sees other folders.
    return this.started && !this.visible;
  }
}

/** QEMU tells it in words alone ("NBD server already running"). */
function isRunning(error: unknown): boolean {
  return error instanceof ThickenError && /already running/i.test(error.message);
}

export function isNotRunning(error: unknown): boolean {
  return error instanceof ThickenError && /NBD server not running/i.test(error.message);
}

/** QEMU binds the socket, and may be another user. */
async function makeFolder(peer: number | null): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), `${ownName()}-`));
  await chmod(folder, 0o700);
  const user = peer === null ? null : await userOf(peer);
  if (user && user.uid !== process.getuid?.()) await chown(folder, user.uid, user.gid).catch(() => undefined);
  return folder;
}

/** The folder in /proc belongs to root where a process has changed its user itself (-runas). */
async function userOf(pid: number): Promise<{ uid: number; gid: number } | null> {
  const text = await readFile(`/proc/${pid}/status`, 'latin1').catch(() => '');
  const [uid, gid] = ['Uid', 'Gid'].map((name) => new RegExp(`^${name}:\\t\\d+\\t(\\d+)`, 'm').exec(text)?.[1]);
  return uid === undefined || gid === undefined ? null : { uid: Number(uid), gid: Number(gid) };
}

/** By a descriptor: QEMU's user could have put a link in the socket's place. */
async function makePrivate(path: string): Promise<boolean> {
  const handle = await open(path, O_PATH | constants.O_NOFOLLOW);
  try {
    if (!(await handle.stat()).isSocket()) return false;
    await chmod(`/proc/self/fd/${handle.fd}`, 0o600);
    return true;
  } finally {
    await handle.close();
  }
}

export function isGone(error: unknown): boolean {
  return (
    error instanceof ThickenError &&
    ['QMP_LOST', 'QMP_PROTOCOL', 'CLOSED', 'QMP_COMMAND'].includes(error.code)
  );
}

/**
 * Unless somebody listens there still: by the folder, the next run finds the server. Names only what
 * we made: others may write to the folder, and could lead a recursive removal astray.
 */
async function removeFolder(folder: string): Promise<void> {
  const socket = join(folder, SOCKET);
  if (await isListenedOn(socket)) return giveUp(folder);
  await unlink(socket).catch(() => undefined);
  await rmdir(folder).catch(() => undefined);
}

/** A killed run leaves its server running: known by its folder, and by who listens there. */
async function endAbandonedServers(client: QmpClient): Promise<void> {
  const names = await readdir(tmpdir()).catch(() => []);
  // A storage daemon is ended by whoever starts the next one.
  for (const name of names.filter((entry) => isAbandoned(entry) && !isDaemonFolder(entry))) {
    const socket = join(tmpdir(), name, SOCKET);
    const pid = client.peerPid();
    const runs = await isListenedOn(socket);
    // Another QEMU's, and so for a run on that one.
    if (runs && (pid === null || !(await listens(pid, socket)))) continue;
    const folder = await claim(name);
    if (folder === null) continue;
    if (!runs || (await stopServer(client))) await removeFolder(folder);
    // By its name the next run finds the server.
    else await rename(folder, join(tmpdir(), name)).catch(() => undefined);
  }
}

function stopServer(client: QmpClient): Promise<boolean> {
  return client.execute('nbd-server-stop').then(
    () => true,
    (error: unknown) => isNotRunning(error),
  );
}

function exists(path: string): Promise<boolean> {
  return lstat(path).then(
    () => true,
    () => false,
  );
}

/** Of two runs that find the same folder one gets it: the other would stop the server of the first. */
async function claim(name: string): Promise<string | null> {
  const from = join(tmpdir(), name);
  const to = join(tmpdir(), `${ownName()}-claimed`);
  try {
    if (!(await lstat(from)).isDirectory()) return null;
    await rename(from, to);
    return to;
  } catch {
    return null;
  }
}
