import type { Descriptor } from '../descriptor.js';
import { errors } from '../errors.js';
import { FileHold } from '../file-hold.js';
import type { Filesystem } from '../filesystem.js';

/** There buffered zeros are faster than direct ones (btrfs), or direct I/O is none (tmpfs). */
const BUFFERED_ONLY = new Set(['btrfs', 'tmpfs']);

/** A file that nobody else writes to, for zeros to be written. Throws IN_USE, EACCES, EPERM or EROFS. */
export async function holdFile(
  file: Descriptor,
  { type }: Filesystem,
  options: { trusted: boolean; guarded?: boolean },
): Promise<FileHold> {
  // A writer to the upper layer's file takes no lease or lock on this one.
  if (type === 'overlayfs' && !options.trusted) {
    throw errors.cannotTellUsers(file.path, 'overlayfs hides who has the file open');
  }
  return FileHold.take(file, { direct: !BUFFERED_ONLY.has(type), ...options });
}
