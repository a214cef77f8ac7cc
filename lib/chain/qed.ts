/** The header of QED images (QEMU, docs/interop/qed_spec.txt). Numbers are little-endian. */
import { BadHeader, checkMagic, readAll, sizeOf, textOf, type HeaderFacts, type ReadBytes } from './facts.js';

const HEADER_LENGTH = 64;
const HAS_BACKING = 1n;
/** The only format that the format knows of: there is nothing to probe. */
const BACKING_IS_RAW = 4n;
const KNOWN = 7n;
const MOST_NAME = 1023;

export async function readQed(bytes: ReadBytes): Promise<HeaderFacts> {
  const head = await readAll(bytes, 0, HEADER_LENGTH, 'the header');
  checkMagic(head, 'QED\0');
  const features = head.readBigUInt64LE(16);
  if ((features & ~KNOWN) !== 0n) throw new BadHeader('it has features that are not known');
  const format = (features & BACKING_IS_RAW) !== 0n ? 'raw' : null;
  return {
    virtualSize: sizeOf(head.readBigUInt64LE(48)),
    clusterSize: clusterOf(head),
    subclusters: false,
    backing: (features & HAS_BACKING) === 0n ? null : { name: await readName(bytes, head), format },
    dataFile: null,
    encryption: null,
    snapshots: 0,
  };
}

/** A power of two, from 4 KiB to 64 MiB. */
function clusterOf(head: Buffer): number {
  const size = head.readUInt32LE(4);
  const bits = Math.log2(size);
  if (Number.isInteger(bits) && bits >= 12 && bits <= 26) return size;
  throw new BadHeader(`clusters of ${size} bytes`);
}

async function readName(bytes: ReadBytes, head: Buffer): Promise<string> {
  const [offset, length] = [head.readUInt32LE(56), head.readUInt32LE(60)];
  if (length === 0 || length > MOST_NAME) throw new BadHeader('the backing file’s name is empty or too long');
  const name = await readAll(bytes, offset, length, 'the backing file’s name');
  if (name.includes(0)) throw new BadHeader('the backing file’s name has a NUL character');
  return textOf(name, 'the backing file’s name');
}
