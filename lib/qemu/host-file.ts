/** The file that a QEMU has open, found from here. */
import { readdir, readlink, stat } from 'node:fs/promises';
import type { Stats } from 'node:fs';
import { isAbsolute, resolve } from 'node:path';
import type { QmpClient } from '../qmp/client.js';
import { Descriptor, READ_ONLY } from '../descriptor.js';
import { diskErrors } from './errors.js';
import type { GuestDisk } from './disks.js';

/**
 * Opens the file of a disk for reading: by the name that QEMU tells, or through /proc where that is
 * a descriptor passed to it (/dev/fdset/N). It is the same inode that QEMU has open, or this throws
 * CHANGED; UNSUPPORTED where that can't be told from here.
 */
export async function openHostFile(client: QmpClient, disk: GuestDisk): Promise<Descriptor> {
  const pid = client.peerPid();
  if (pid === null) throw diskErrors.cannotFind(disk.name, 'QEMU’s process is not known');
  const open = await openFilesOf(pid, disk.name);
  const path = await pathOf(client, disk, pid);
  const facts = await stat(path).catch(() => null);
  const held = open.find(({ facts: other }) => facts && other.dev === facts.dev && other.ino === facts.ino);
  if (!facts || !held) throw diskErrors.notTheFile(disk.name, path);
  // Through /proc: the name may lead elsewhere by now, in another mount namespace for one.
  return Descriptor.openSame(held.path, READ_ONLY, facts);
}

interface OpenFile {
  path: string;
  facts: Stats;
}

async function openFilesOf(pid: number, name: string): Promise<OpenFile[]> {
  const folder = `/proc/${pid}/fd`;
  const numbers = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    throw diskErrors.cannotFind(name, `${folder}: ${error.code ?? error.message}`);
  });
  const files = numbers.map(async (number) => {
    const path = `${folder}/${number}`;
    const facts = await stat(path).catch(() => null);
    return facts?.isFile() || facts?.isBlockDevice() ? [{ path, facts }] : [];
  });
  return (await Promise.all(files)).flat();
}

async function pathOf(client: QmpClient, disk: GuestDisk, pid: number): Promise<string> {
  const [, number] = /^\/dev\/fdset\/(\d+)$/.exec(disk.file) ?? [];
  if (number !== undefined) return fdsetPath(client, disk, pid, Number(number));
  if (/^[a-z][a-z0-9+.-]*:/i.test(disk.file)) throw diskErrors.cannotFind(disk.name, 'it is no local file');
  const root = `/proc/${pid}/root`;
  if (isAbsolute(disk.file)) return root + disk.file;
  const folder = await readlink(`/proc/${pid}/cwd`).catch(() => '/');
  return root + resolve(folder, disk.file);
}

async function fdsetPath(client: QmpClient, disk: GuestDisk, pid: number, number: number): Promise<string> {
  const sets = await client.execute('query-fdsets');
  const fds = sets.find((set) => set['fdset-id'] === number)?.fds ?? [];
  if (!fds[0]) throw diskErrors.cannotFind(disk.name, `fdset ${number} is empty`);
  return `/proc/${pid}/fd/${fds[0].fd}`;
}
