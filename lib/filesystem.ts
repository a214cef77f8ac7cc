/** What the file system under an image is, can do, and can promise. */
import type { StatsFs } from 'node:fs';
import { stat, statfs } from 'node:fs/promises';
import { dirname } from 'node:path';
import type { Descriptor } from './descriptor.js';
import { native } from './native.js';

/** f_type of statfs(2) (linux/magic.h and the file systems' own headers). */
const TYPES: Record<number, string> = {
  0xef53: 'ext4',
  0x58465342: 'xfs',
  0x9123683e: 'btrfs',
  0x01021994: 'tmpfs',
  0x6969: 'nfs',
  0xff534d42: 'cifs',
  0xfe534d42: 'smb2',
  0x2fc12fc1: 'zfs',
  0xca451a4e: 'bcachefs',
  0xf2f52010: 'f2fs',
  0x794c7630: 'overlayfs',
  0x65735546: 'fuse',
  0x01021997: '9p',
  0x00c36400: 'ceph',
  0x47504653: 'gpfs',
  0x01161970: 'gfs2',
  0x7461636f: 'ocfs2',
  0x3153464a: 'jfs',
  0x4d44: 'vfat',
};

/** File systems that write a block where it lies, so that an allocated block stays one. */
const IN_PLACE = new Set(['ext4', 'xfs', 'tmpfs', 'gfs2', 'ocfs2', 'jfs', 'vfat']);

// linux/fs.h
const COMPRESSED = 0x4;
const IMMUTABLE = 0x10;
const EXTENTS = 0x80000;
const NO_COW = 0x800000;

export interface Filesystem {
  type: string;
  /** Bytes: the unit of allocation. */
  blockSize: number;
  /** Each starts hopeful, and is turned off by the first answer that says otherwise. */
  abilities: { fallocate: boolean; unshare: boolean; fiemap: boolean };
  /** Whether an overwrite of an allocated block may need a new one. */
  cow: boolean;
  immutable: boolean;
  /** Why storage can't be guaranteed here; null where it can. */
  noGuarantee: string | null;
  /** Bytes: alignment of direct I/O; 0 where the kernel does not tell. */
  directAlignment: number;
}

export async function readFilesystem(file: Descriptor): Promise<Filesystem> {
  const [facts, statistics] = await file.use((fd) =>
    Promise.all([native().fileFacts(fd), statfs(`/proc/self/fd/${fd}`)]),
  );
  const type = TYPES[statistics.type] ?? `0x${statistics.type.toString(16)}`;
  const flags = facts.inodeFlags ?? 0;
  const noGuarantee = whyNoGuarantee(type, flags);
  return {
    type,
    blockSize: facts.blockSize,
    abilities: {
      // Without this flag an ext file has block maps, in which nothing can be reserved unwritten
      // (ext4_fallocate, Linux 6.18); asking would need a write.
      fallocate: type !== 'ext4' || facts.inodeFlags === null || (flags & EXTENTS) !== 0,
      unshare: type === 'xfs',
      fiemap: type !== 'tmpfs',
    },
    cow: (type === 'btrfs' && (flags & NO_COW) === 0) || ['zfs', 'bcachefs', 'f2fs'].includes(type),
    immutable: (flags & IMMUTABLE) !== 0,
    noGuarantee,
    directAlignment: facts.directOffset,
  };
}

function whyNoGuarantee(type: string, flags: number): string | null {
  if (type === 'btrfs') {
    if (flags & COMPRESSED) return 'btrfs compresses this file: an overwrite may need new blocks';
    if (flags & NO_COW) return null;
    return 'btrfs copies on write (no NOCOW attribute): an overwrite needs new blocks';
  }
  if (IN_PLACE.has(type)) return null;
  return `${type} is not known to keep a file's blocks in place: an overwrite may need new ones`;
}

export interface Space {
  /** Bytes that may still be allocated. */
  available: number;
  /** Bytes of the file system in all; Infinity where it has no limit. */
  total: number;
  /** Whether a quota, not the file system, sets `available`. */
  quota: boolean;
}

/**
 * Space for the file. Where a project quota rules a directory (ext4 and xfs), statfs(2) of the
 * directory tells what the quota leaves; btrfs keeps its quota groups in a tree of their own.
 */
export async function readSpace(file: Descriptor, type: string): Promise<Space> {
  const own = spaceIn(await file.use((fd) => statfs(`/proc/self/fd/${fd}`)));
  // tmpfs mounted with size=0 has no limit, and says 0 blocks.
  if (own.total === 0) return { available: Infinity, total: Infinity, quota: false };
  const limit = await quotaOf(file, type, own.total);
  if (limit === null || limit >= own.available) return own;
  return { ...own, available: limit, quota: true };
}

function spaceIn({ bavail, blocks, bsize }: StatsFs): Space {
  return { available: bavail * bsize, total: blocks * bsize, quota: false };
}

/** Bytes that a quota leaves; null where there is none. */
async function quotaOf(file: Descriptor, type: string, total: number): Promise<number | null> {
  if (type === 'btrfs') return file.use((fd) => native().btrfsQuota(fd));
  if (type !== 'ext4' && type !== 'xfs') return null;
  const directory = dirname(file.path);
  try {
    const [own, other, statistics] = await Promise.all([
      file.use((fd) => stat(`/proc/self/fd/${fd}`)),
      stat(directory),
      statfs(directory),
    ]);
    const space = spaceIn(statistics);
    // A bind-mounted file lies in a directory of another file system. A quota is told by its total,
    // which does not change while others write.
    return own.dev === other.dev && space.total < total ? space.available : null;
  } catch {
    return null;
  }
}
