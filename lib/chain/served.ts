/** Reads the header of an image whose bytes an NBD server has. */
import { ThickenError } from '../errors.js';
import { NbdClient } from '../nbd/client.js';
import type { NbdUri } from '../nbd/uri.js';
import { roundDown, roundUp } from '../range.js';
import { chainErrors } from './errors.js';
import type { HeaderFacts, ReadBytes } from './facts.js';
import { headerBy } from './header.js';

/** Of a format that `hasBacking`, by a connection that ends with it. Throws BACKING_MISSING, and as readHeader. */
export async function readServedHeader(uri: NbdUri, path: string, format: string): Promise<HeaderFacts> {
  const explained = async <T>(work: Promise<T>): Promise<T> => {
    try {
      return await work;
    } catch (error) {
      if (!(error instanceof ThickenError)) throw error;
      throw chainErrors.unserved(path, error.message, error);
    }
  };
  await using nbd = await explained(NbdClient.connect(uri));
  return await headerBy((offset, length) => explained(readPart(nbd, offset, length)), path, format);
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
