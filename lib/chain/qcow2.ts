/** The header of qcow2 images (QEMU, docs/interop/qcow2.txt). Numbers are big-endian. */
import { BadHeader, checkMagic, readAll, sizeOf, textOf, type HeaderFacts, type ReadBytes } from './facts.js';

const V2_LENGTH = 72;
const V3_LENGTH = 104;
const DATA_FILE_BIT = 1n << 2n;
const EXTENDED_L2_BIT = 1n << 4n;
const BACKING_FORMAT = 0xe2792aca;
const DATA_FILE_NAME = 0x44415441;
/** Of names, by the specification; QEMU takes formats of 15 (block/qcow2.c). */
const MOST_NAME = 1023;
/** No version of QEMU writes more extensions than some ten. */
const MOST_EXTENSIONS = 64;

export async function readQcow2(bytes: ReadBytes): Promise<HeaderFacts> {
  const head = await readAll(bytes, 0, V2_LENGTH, 'the header');
  checkMagic(head, 'QFI\xfb');
  const version = head.readUInt32BE(4);
  if (version !== 2 && version !== 3) throw new BadHeader(`version ${version} is not known`);
  const clusterBits = head.readUInt32BE(20);
  if (clusterBits < 9 || clusterBits > 21) throw new BadHeader(`clusters of 2^${clusterBits} bytes`);
  // The specification puts the extensions and the backing file's name there.
  const first = await bytes(0, 1 << clusterBits);
  const extensions = readExtensions(first, version);
  const backing = backingName(first);
  const format = extensions.get(BACKING_FORMAT);
  return {
    virtualSize: sizeOf(head.readBigUInt64BE(24)),
    clusterSize: 1 << clusterBits,
    subclusters: hasFeature(first, version, EXTENDED_L2_BIT),
    backing: backing === null ? null : { name: backing, format: format ? textOf(format, 'the backing format') : null },
    dataFile: dataFileOf(first, version, extensions.get(DATA_FILE_NAME)),
    encryption: encryptionOf(head.readUInt32BE(32)),
    snapshots: head.readUInt32BE(60),
  };
}

function encryptionOf(method: number): HeaderFacts['encryption'] {
  const known = ([null, 'aes', 'luks'] as const)[method];
  if (known === undefined) throw new BadHeader(`it is encrypted by method ${method}`);
  return known;
}

/** Incompatible features; version 2 has none. */
function hasFeature(first: Buffer, version: number, bit: bigint): boolean {
  return version === 3 && first.length >= V3_LENGTH && (first.readBigUInt64BE(72) & bit) !== 0n;
}

function backingName(first: Buffer): string | null {
  const offset = first.readBigUInt64BE(8);
  const length = first.readUInt32BE(16);
  if (offset === 0n || length === 0) return null;
  if (length > MOST_NAME) throw new BadHeader('the backing file’s name is too long');
  if (offset + BigInt(length) > BigInt(first.length)) throw new BadHeader('the backing file’s name lies outside');
  const name = first.subarray(Number(offset), Number(offset) + length);
  // A name with a NUL would be one to us, and another one to QEMU.
  if (name.includes(0)) throw new BadHeader('the backing file’s name has a NUL character');
  return textOf(name, 'the backing file’s name');
}

function readExtensions(first: Buffer, version: number): Map<number, Buffer> {
  const found = new Map<number, Buffer>();
  let at = version === 2 ? V2_LENGTH : first.length < V3_LENGTH ? Infinity : first.readUInt32BE(100);
  for (let i = 0; at + 8 <= first.length; i++) {
    const type = first.readUInt32BE(at);
    const length = first.readUInt32BE(at + 4);
    if (type === 0) return found;
    if (at + 8 + length > first.length) throw new BadHeader('a header extension reaches outside');
    if (i === MOST_EXTENSIONS) throw new BadHeader('there are too many header extensions');
    if (found.has(type)) throw new BadHeader('a header extension is there twice');
    found.set(type, first.subarray(at + 8, at + 8 + length));
    at += 8 + Math.ceil(length / 8) * 8;
  }
  return found;
}

function dataFileOf(first: Buffer, version: number, name: Buffer | undefined): string | null {
  if (!hasFeature(first, version, DATA_FILE_BIT)) return null;
  if (!name || name.length === 0) throw new BadHeader('its external data file has no name');
  return textOf(name, 'the data file’s name');
}
