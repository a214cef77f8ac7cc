/** From what the user names to an image. */
import { openFile, type OpenOptions } from './file-image.js';
import type { Image } from './image.js';
import type { TlsOptions } from './nbd/client.js';
import { isNbdUri } from './nbd/uri.js';
import { openTarget, type GuestTarget } from './target.js';

export type { OpenOptions } from './file-image.js';

/**
 * Opens a path (an image file or a block device), an export of an NBD server by its URI, or a disk
 * that a running QEMU has open. Nothing is changed or locked before `allocate`; a guest's disk gets
 * an export for its map. Throws a ThickenError: the errno's name, EISDIR, UNSUPPORTED, USAGE, RANGE,
 * CHANGED; of an export also NBD_LOST, NBD_REFUSED, NBD_TLS, NBD_TIMEOUT, NBD_PROTOCOL; of a guest's
 * disk also MONITOR_BUSY, QMP_LOST, UNKNOWN_DEVICE, NBD_BUSY, and what else QmpClient throws.
 */
export async function open(
  target: string | GuestTarget,
  options: OpenOptions & { nbd?: string; tls?: TlsOptions | true } = {},
): Promise<Image> {
  // Loaded only where they are needed: the command line starts the faster.
  if (typeof target === 'string' && isNbdUri(target)) {
    const { openNbd } = await import('./nbd-image.js');
    return openNbd(target, options);
  }
  if (typeof target === 'string') return openFile(await openTarget(target), options);
  const { openGuestDisk } = await import('./qemu/guest-image.js');
  return openGuestDisk(target, options);
}
