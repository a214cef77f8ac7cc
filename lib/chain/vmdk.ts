/** The header of VMDK images of one sparse file (VMware, Virtual Disk Format 5.0). Little-endian. */
import { BadHeader, checkMagic, NamesFiles, readAll, sizeOf, textOf, type HeaderFacts, type ReadBytes } from './facts.js';

const SECTOR = 512;
const HEADER_LENGTH = 79;
/** QEMU reads so much of the descriptor (block/vmdk.c, DESC_SIZE). */
const MOST_DESCRIPTOR = 20 * SECTOR;
const ONE_FILE = new Set(['monolithicSparse', 'streamOptimized']);

export async function readVmdk(bytes: ReadBytes): Promise<HeaderFacts> {
  const head = await readAll(bytes, 0, HEADER_LENGTH, 'the header');
  if (head.toString('latin1', 0, 21) === '# Disk DescriptorFile') throw new NamesFiles('a text descriptor');
  checkMagic(head, 'KDMV');
  const capacity = head.readBigUInt64LE(12);
  // QEMU then takes what is embedded for the descriptor of other files.
  if (capacity === 0n) throw new NamesFiles('a sparse extent without size');
  const descriptor = await readDescriptor(bytes, head);
  const type = valueOf(descriptor, 'createType') ?? '';
  if (!ONE_FILE.has(type)) throw new NamesFiles(`a disk of type ${JSON.stringify(type.slice(0, 40))}`);
  const parent = valueOf(descriptor, 'parentFileNameHint');
  return {
    virtualSize: sizeOf(capacity * BigInt(SECTOR)),
    clusterSize: clusterOf(head),
    subclusters: false,
    // The parent is known by the content id in its descriptor: it can't be of another format.
    backing: parent ? { name: parent, format: 'vmdk' } : null,
    dataFile: null,
    encryption: null,
    snapshots: 0,
  };
}

/** "Grains", as the format has it: a power of two of more than eight sectors; QEMU takes up to 64 MiB. */
function clusterOf(head: Buffer): number {
  const sectors = head.readBigUInt64LE(20);
  const bits = Math.log2(Number(sectors));
  if (Number.isInteger(bits) && bits >= 3 && bits <= 17) return Number(sectors) * SECTOR;
  throw new BadHeader(`grains of ${sectors} sectors`);
}

async function readDescriptor(bytes: ReadBytes, head: Buffer): Promise<string> {
  const offset = head.readBigUInt64LE(28) * BigInt(SECTOR);
  const length = head.readBigUInt64LE(36) * BigInt(SECTOR);
  if (offset === 0n || length === 0n) throw new BadHeader('it has no descriptor');
  const most = length > BigInt(MOST_DESCRIPTOR) ? MOST_DESCRIPTOR : Number(length);
  return textOf(await readAll(bytes, sizeOf(offset), most, 'the descriptor'), 'the descriptor');
}

/** The first one counts, in quotes or not; QEMU looks for the name anywhere. */
function valueOf(descriptor: string, key: string): string | null {
  const all = [...descriptor.matchAll(new RegExp(`${key}\\s*=\\s*"([^"]*)"`, 'g'))];
  if (all.length > 1) throw new BadHeader(`${key} is there twice`);
  return all[0]?.[1] ?? null;
}
