/** What thicken's own client finds out of a layer that an NBD server has. */
import { ThickenError } from '../errors.js';
import { NbdClient } from '../nbd/client.js';
import type { NbdUri } from '../nbd/uri.js';
import { roundDown, roundUp } from '../range.js';
import { chainErrors } from './errors.js';
import type { HeaderFacts, ReadBytes } from './facts.js';
import { headerBy } from './header.js';

/** Of a format that `hasBacking`, by a connection that ends with it. Throws BACKING_MISSING, and as readHeader. */
export async function readServedHeader(uri: NbdUri, path: string, format: string): Promise<HeaderFacts> {
  await using nbd = await explained(path, NbdClient.connect(uri));
  return await headerBy((offset, length) => explained(path, readPart(nbd, offset, length)), path, format);
}

/** Bytes of the export. Throws BACKING_MISSING where the server does not let us in. */
export async function servedSize(uri: NbdUri, path: string): Promise<number> {
  await using nbd = await explained(path, NbdClient.connect(uri));
  return nbd.size;
}

async function explained<T>(path: string, work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    if (!(error instanceof ThickenError)) throw error;
    throw chainErrors.unserved(path, error.message, error);
  }
}

/** In the server's units. */
async function readPart(nbd: NbdClient, ...[offset, length]: Parameters<ReadBytes>): Promise<Buffer> {
  const unit = nbd.blockSize.minimum;
  const start = roundDown(offset, unit);
  const end = Math.min(roundUp(offset + length, unit), nbd.size);
  if (end <= offset) return Buffer.alloc(0);
  const bytes = await nbd.read(start, end - start);
  return bytes.subarray(offset - start, offset - start + length);
}
