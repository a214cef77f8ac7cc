/** Ends what killed thickens have left of storage daemons: known by the folders of their sockets. */
import { readdir, rmdir, unlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { QmpClient } from '../qmp/client.js';
import { MONITOR_SOCKET, NBD_SOCKET } from './daemon-process.js';
import { isListenedOn } from './listener.js';
import { isAbandoned, isDaemonFolder } from './owner.js';

const CONNECT_MS = 2_000;
/** A guardian that is at it already takes 5 s at most. */
const LOOKS = 200;
const LOOK_MS = 50;

/** Names only what lies in it. */
async function removeFolder(folder: string): Promise<void> {
  for (const name of [MONITOR_SOCKET, NBD_SOCKET]) {
    await unlink(join(folder, name)).catch(() => undefined);
  }
  await rmdir(folder).catch(() => undefined);
}

/**
 * Ends the daemons of thickens that are no more, and waits until they are gone: they hold locks. One
 * that does not go in time is left to its guardian, and to the next run.
 */
export async function endAbandonedDaemons(): Promise<void> {
  const names = await readdir(tmpdir()).catch(() => []);
  const left = names.filter((name) => isDaemonFolder(name) && isAbandoned(name));
  await Promise.all(left.map((name) => endDaemon(join(tmpdir(), name))));
}

async function endDaemon(folder: string): Promise<void> {
  const socket = join(folder, MONITOR_SOCKET);
  if (await isListenedOn(socket)) await quit(socket).catch(() => undefined);
  for (let i = 0; i < LOOKS && (await isListenedOn(socket)); i++) await sleep(LOOK_MS);
  if (!(await isListenedOn(socket))) await removeFolder(folder);
}

async function quit(socket: string): Promise<void> {
  await using client = await QmpClient.connect(socket, { timeoutMs: CONNECT_MS });
  await client.executeAny('quit', undefined, { timeoutMs: CONNECT_MS });
}
