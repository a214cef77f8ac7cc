/** Formats that QEMU alone writes: which images of them can be given storage (tried with QEMU 7.2). */
import { read } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from '../descriptor.js';
import { diskErrors } from './errors.js';

const readFile = promisify(read);

const SECTOR = 512;

interface StoredFormat {
  /** Whether QEMU tells what an image maps. */
  tells: boolean;
  /** What an image with this head is that can't be given storage; null: it can. */
  refuses?(head: Buffer): string | null;
  /** Bytes of a cluster, by the head, where QEMU does not tell them. */
  cluster?(head: Buffer): number;
}

const FORMATS: Record<string, StoredFormat> = {
  qed: { tells: true },
  vmdk: { tells: true, refuses: refuseVmdk },
  vdi: { tells: true },
  vhdx: { tells: false },
  vpc: { tells: true, refuses: refuseVpc },
  parallels: { tells: true, cluster: (head) => head.readUInt32LE(28) * SECTOR },
};

export function isStored(format: string): boolean {
  return Object.hasOwn(FORMATS, format);
}

export function tellsMap(format: string): boolean {
  return FORMATS[format]!.tells;
}

/** Throws UNSUPPORTED, with the name of what can't be dealt with. */
export async function checkStored(file: Descriptor, format: string): Promise<void> {
  const what = FORMATS[format]!.refuses?.(await headOf(file)) ?? null;
  if (what !== null) throw diskErrors.cannotThicken(file.path, what);
}

/** Bytes. Throws UNSUPPORTED where the head tells none that makes sense. */
export async function clusterOf(file: Descriptor, format: string): Promise<number> {
  const cluster = FORMATS[format]!.cluster?.(await headOf(file)) ?? 0;
  if (cluster >= SECTOR && cluster % SECTOR === 0) return cluster;
  throw diskErrors.cannotThicken(file.path, `a ${format} image that tells no size of its clusters`);
}

async function headOf(file: Descriptor): Promise<Buffer> {
  const head = Buffer.alloc(2 * SECTOR);
  await file.use((fd) => readFile(fd, head, 0, head.length, 0));
  return head;
}

/** VMware, Virtual Disk Format 5.0: bit 16 of the flags, and an algorithm, say that grains are compressed. */
function refuseVmdk(head: Buffer): string | null {
  if (head.toString('latin1', 0, 4) !== 'KDMV') return 'a VMDK image whose data lies in other files';
  const compressed = (head.readUInt32LE(8) & 0x10000) !== 0 || head.readUInt16LE(77) !== 0;
  return compressed ? 'a VMDK image of type streamOptimized, whose grains are compressed' : null;
}

/** A fixed disk has its footer at the end alone; a dynamic one a copy of it at the start, with its type. */
function refuseVpc(head: Buffer): string | null {
  const dynamic = head.toString('latin1', 0, 8) === 'conectix' && head.readUInt32BE(60) === 3;
  return dynamic ? null : 'a VHD image of another type than dynamic (a fixed one is a raw image with a footer: --format raw)';
}
