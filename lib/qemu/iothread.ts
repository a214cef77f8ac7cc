/** Whether a disk may be exported while its requests run in a thread of their own. */
import { ThickenError } from '../errors.js';
import type { QmpClient } from '../qmp/client.js';
import type { GuestDisk } from './disks.js';
import { diskErrors } from './errors.js';

/** Where the closing of NBD clients was moved into the main thread (nbd/server.c). */
const SAFE_MAJOR = 9;

/**
 * Throws UNSUPPORTED where the end of an NBD client could end QEMU: of a node in an iothread it is
 * noticed in that thread, and nbd_blockdev_client_closed asserts that it is not (7.2.22). No
 * feature tells, so this is the one place that goes by the version. It concerns every end of
 * thicken's, kill -9 included.
 */
export async function checkThreads(client: QmpClient, disk: GuestDisk): Promise<void> {
  const { qemu } = await client.execute('query-version');
  if (qemu.major >= SAFE_MAJOR || !(await hasThreads(client))) return;
  const thread = await threadOf(client, disk);
  if (thread === null) return;
  throw diskErrors.unsupportedHere(
    disk.name,
    `the disk’s requests run in ${thread}: this QEMU (before ${SAFE_MAJOR}.0) would end with thicken`,
  );
}

async function hasThreads(client: QmpClient): Promise<boolean> {
  if (!(await client.supports('query-iothreads'))) return false;
  const threads = await client.executeAny('query-iothreads');
  return Array.isArray(threads) && threads.length > 0;
}

/** A disk of virtio-blk has the link itself; of others, a thread may be their controller's. */
async function threadOf(client: QmpClient, disk: GuestDisk): Promise<string | null> {
  const path = disk.names.find((name) => name.startsWith('/machine/') && !name.endsWith('/virtio-backend'));
  if (path === undefined) return 'an iothread, possibly';
  try {
    const link = await client.execute('qom-get', { path, property: 'iothread' });
    return link === '' ? null : 'an iothread';
  } catch (error) {
    if (error instanceof ThickenError && error.code === 'QMP_COMMAND') return 'an iothread, possibly';
    throw error;
  }
}
