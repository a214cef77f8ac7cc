/** From what the user names to an image. */
import { openFile } from './file-image.js';
import type { Format } from './format.js';
import type { Image } from './image.js';
import type { TlsOptions } from './nbd/client.js';
import { isNbdUri } from './nbd/uri.js';
import type { OpenOptions } from './open-options.js';
import { probe } from './probe.js';
import { openTarget, type GuestTarget, type Target } from './target.js';

export type { OpenOptions } from './open-options.js';

/**
 * Opens a path (an image file or a block device), an export of an NBD server by its URI, or a disk
 * that a running QEMU has open. Nothing is changed or locked before `allocate`; a guest's disk gets
 * an export for its map. Throws a ThickenError: the errno's name, EISDIR, UNSUPPORTED, USAGE, RANGE,
 * CHANGED; of a qcow2 image also NOT_QCOW2, QCOW2_CORRUPT, QCOW2_OUTSIDE_FILE, QCOW2_ABSURD,
 * QCOW2_UNKNOWN_FEATURE; of one over others what Chain.open throws; of an export NBD_LOST, NBD_REFUSED, NBD_TLS, NBD_TIMEOUT, NBD_PROTOCOL; of a
 * guest's disk MONITOR_BUSY, QMP_LOST, UNKNOWN_DEVICE, NBD_BUSY, and what else QmpClient throws.
 */
export async function open(
  target: string | GuestTarget,
  options: OpenOptions & { nbd?: string; tls?: TlsOptions | true } = {},
): Promise<Image> {
  const image = await openAny(target, options);
  if (options.secret !== undefined) image.noteKey();
  return image;
}

async function openAny(
  target: string | GuestTarget,
  options: OpenOptions & { nbd?: string; tls?: TlsOptions | true },
): Promise<Image> {
  if (typeof target === 'string' && isNbdUri(target)) {
    // Loaded only where it is needed, as the next: the command line starts the faster.
    const { openNbd } = await import('./nbd-image.js');
    return openNbd(target, options);
  }
  if (typeof target === 'string') return openPath(await openTarget(target), options);
  const { openGuestDisk } = await import('./qemu/guest-image.js');
  return openGuestDisk(target, options);
}


/** Each kind of image is loaded only where it is needed. */
async function openPath(target: Target, options: OpenOptions): Promise<Image> {
  const format = await formatOf(target, options);
  if (target.kind === 'block' || format.name === 'raw') return openFile(target, options);
  if (format.name !== 'qcow2') return openOther(target, format, options);
  const { openQcow2 } = await import('./qcow2/image.js');
  // A guest can write a header into its raw disk: one that is none is no reason to fail.
  const fallback = format.doubtful ? () => openFile(target, options) : undefined;
  return openQcow2(target, format, options, fallback);
}

/** A suffix speaks for a format, but not for what an image says that it lies on (safety rule 7). */
async function openOther(target: Target, format: Format, options: OpenOptions): Promise<Image> {
  const { isStored, openStored } = await import('./qemu/stored-image.js');
  const spoken = format.by === 'option' || (!format.doubtful && (await liesAlone(target, format)));
  if (!spoken || !isStored(format.name)) return openFile(target, options);
  return openStored(target.descriptor, format, options);
}

async function liesAlone({ descriptor }: Target, { name }: Format): Promise<boolean> {
  const { hasBacking, readHeader } = await import('./chain/header.js');
  if (!hasBacking(name)) return true;
  return readHeader(descriptor, name).then(({ backing }) => backing === null, () => false);
}

async function formatOf({ descriptor }: Target, options: OpenOptions) {
  try {
    return (await probe(descriptor, options.format)).format;
  } catch (error) {
    await descriptor.close();
    throw error;
  }
}
