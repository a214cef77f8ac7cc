/** Who listens on a UNIX socket, found without connecting to it. */
import { readdir, readFile, readlink } from 'node:fs/promises';

/** Flags of a socket that listens (linux/net.h, __SO_ACCEPTCON), as /proc/net/unix has them. */
const LISTENING = 0x10000;

/**
 * The inodes of the sockets that listen by a name (proc(5), unix(7)); of this network namespace.
 * To connect instead and hang up leaves QEMU a client in its handshake, for which nbd-server-stop
 * waits for ever, and the guest with it (7.2.22).
 */
async function inodesOf(path: string): Promise<string[]> {
  const table = await readFile('/proc/net/unix', 'latin1').catch(() => '');
  const name = Buffer.from(path).toString('latin1');
  return table.split('\n').flatMap((line) => {
    // Num RefCount Protocol Flags Type St Inode Path
    const [, flags = '', inode = '', bound] = /^\S+ \S+ \S+ (\S+) \S+ \S+ +(\S+) (.*)$/.exec(line) ?? [];
    return bound === name && (parseInt(flags, 16) & LISTENING) !== 0 ? [inode] : [];
  });
}

export async function isListenedOn(path: string): Promise<boolean> {
  return (await inodesOf(path)).length > 0;
}

/** Whether the process is the one that listens. */
export async function listens(pid: number, path: string): Promise<boolean> {
  const wanted = new Set((await inodesOf(path)).map((inode) => `socket:[${inode}]`));
  if (wanted.size === 0) return false;
  const folder = `/proc/${pid}/fd`;
  for (const number of await readdir(folder).catch(() => [])) {
    if (wanted.has(await readlink(`${folder}/${number}`).catch(() => ''))) return true;
  }
  return false;
}
