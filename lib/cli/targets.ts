/** What the command line names: paths, or disks of the QEMU behind a monitor. */
import { usageError } from '../errors.js';
import type { Image } from '../image.js';
import { open } from '../open.js';
import type { GuestDisk } from '../qemu/disks.js';
import { nameOf, type GuestTarget } from '../target.js';
import { openOptionsOf, withKey, type CommonOptions, type QemuOptions } from './options.js';

export type NamedTarget = string | GuestTarget;

/** Throws USAGE where it is not clear what is meant; a monitor without a device tells what it has. */
export async function targetsOf(paths: string[], options: QemuOptions): Promise<NamedTarget[]> {
  const { qmp, device = [], nbd } = options;
  if (qmp === undefined) {
    if (device.length > 0) throw usageError('--device without --qmp', 'say which QEMU, by --qmp SOCKET');
    if (nbd !== undefined) throw usageError('--nbd without --qmp', 'say which QEMU, by --qmp SOCKET');
    if (paths.length === 0) throw usageError('no target', 'name a file, a block device, an NBD URI, or --qmp and --device');
    return paths;
  }
  if (paths.length > 0) throw usageError('a path beside --qmp', 'name the one or the other');
  if (device.length === 0) throw await unnamed(qmp);
  return device.map((name) => ({ qmp, device: name }));
}

const opened: Promise<Image>[] = [];

/** The image that is meant, for commands that take one. */
export async function openNamed(path: string | undefined, options: CommonOptions & QemuOptions): Promise<Image> {
  const targets = await targetsOf(path === undefined ? [] : [path], options);
  if (targets.length > 1) throw usageError('more than one --device', 'name one');
  const image = withKey(options, (keyed) => open(targets[0]!, openOptionsOf(keyed)));
  opened.push(image);
  return image;
}

/** For the way out that waits for no command: a QEMU would keep what was added to it. */
export async function closeAll(): Promise<void> {
  await Promise.allSettled(opened.map(async (image) => (await image).close()));
}

export function labelOf(target: NamedTarget): string {
  return typeof target === 'string' ? target : nameOf(target);
}

async function unnamed(qmp: string): Promise<Error> {
  const { diskErrors } = await import('../qemu/errors.js');
  return diskErrors.unnamed(qmp, (await disksOf(qmp)).map(({ name }) => name));
}

export async function disksOf(qmp: string): Promise<GuestDisk[]> {
  const { QmpClient } = await import('../qmp/client.js');
  const { listDisks } = await import('../qemu/disks.js');
  await using client = await QmpClient.connect(qmp);
  return await listDisks(client);
}
