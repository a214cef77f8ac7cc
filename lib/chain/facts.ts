/** What the header of an image tells of its size, and of the files that it lies on. */

export interface HeaderFacts {
  /** Bytes. */
  virtualSize: number;
  clusterSize: number;
  /** Whether clusters are mapped in parts (qcow2, extended L2). */
  subclusters: boolean;
  /** As the image names it; the format where it records one. */
  backing: { name: string; format: string | null } | null;
  /** The name of an external data file (qcow2). */
  dataFile: string | null;
  encryption: 'luks' | 'aes' | null;
  /** Internal snapshots. */
  snapshots: number;
}

/** The bytes of an image from `offset` on, fewer at its end. */
export type ReadBytes = (offset: number, length: number) => Promise<Buffer>;

/** What is wrong with a header. */
export class BadHeader extends Error {}

/** What in an image spreads it over several files. */
export class NamesFiles extends Error {}

/** As many bytes as that, or BadHeader. */
export async function readAll(bytes: ReadBytes, offset: number, length: number, what: string): Promise<Buffer> {
  const buffer = await bytes(offset, length);
  if (buffer.length < length) throw new BadHeader(`the file ends within ${what}`);
  return buffer;
}

export function checkMagic(head: Buffer, magic: string): void {
  if (head.toString('latin1', 0, magic.length) !== magic) throw new BadHeader('it does not begin as one');
}

/** Bytes, as a number. */
export function sizeOf(size: bigint): number {
  if (size <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(size);
  throw new BadHeader('its size is more than 2^53-1 bytes');
}

/** Throws BadHeader where it is no UTF-8: a name that is not what it seems is no name. */
export function textOf(bytes: Buffer, what: string): string {
  const end = bytes.indexOf(0);
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(end < 0 ? bytes : bytes.subarray(0, end));
  } catch {
    throw new BadHeader(`${what} is no UTF-8`);
  }
}
