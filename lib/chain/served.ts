/** What thicken's own client finds out of a layer that an NBD server has. */
import { ThickenError } from '../errors.js';
import { NbdClient } from '../nbd/client.js';
import type { NbdUri } from '../nbd/uri.js';
import { chainErrors } from './errors.js';

/** Bytes of the export. Throws BACKING_MISSING where the server does not let us in. */
export async function servedSize(uri: NbdUri, path: string): Promise<number> {
  try {
    await using nbd = await NbdClient.connect(uri);
    return nbd.size;
  } catch (error) {
    if (!(error instanceof ThickenError)) throw error;
    throw chainErrors.unserved(path, error.message, error);
  }
}
