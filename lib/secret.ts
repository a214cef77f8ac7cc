/** The key of encrypted images: where it is told from, and how it is held. */
import { close, open, read } from 'node:fs';
import { promisify } from 'node:util';
import { isRawSystemError, systemError, usageError } from './errors.js';

const openFile = promisify(open);
const closeFile = promisify(close);
const readFile = promisify(read);

/**
 * A file, or an open descriptor, that holds the key and nothing else, to its end: no newline is taken off, as
 * with QEMU's `secret,file=`; or the key itself. A descriptor is read once, and stays open.
 */
export type SecretSource = { file: string } | { fd: number } | Uint8Array;

const MOST_BYTES = 2 ** 20;
const SOURCES = 'give {file}, {fd}, or the key’s bytes in an Uint8Array';

/** Held in memory of its own, so that it can be wiped when nobody needs it any more. */
export class Secret implements Disposable {
  private constructor(private readonly bytes: Uint8Array) {}

  /** Throws USAGE, and the errno's name of a failed call. */
  static async read(source: SecretSource): Promise<Secret> {
    return new Secret(await readSecret(source));
  }

  /** For a message that carries it. A string can't be wiped: it is made where it is sent. */
  get base64(): string {
    return Buffer.from(this.bytes.buffer).toString('base64');
  }

  [Symbol.dispose](): void {
    this.bytes.fill(0);
  }
}

/** The key's bytes, for the caller to wipe. */
export async function readSecret(source: SecretSource): Promise<Uint8Array<ArrayBuffer>> {
  if (source instanceof Uint8Array) return new Uint8Array(source);
  const { file, fd } = ((source as unknown) instanceof Object ? source : {}) as { file?: unknown; fd?: unknown };
  if (typeof file === 'string') return readName(file);
  if (typeof fd === 'number' && Number.isInteger(fd) && fd >= 0) return readOpen(fd, `descriptor ${fd}`);
  // Not what was given: it may be the key.
  throw usageError('the secret is of a kind that is not known', SOURCES);
}

async function readName(name: string): Promise<Uint8Array<ArrayBuffer>> {
  const fd = await openFile(name, 'r').catch((error: unknown) => {
    throw isRawSystemError(error) ? systemError(error, name) : error;
  });
  try {
    return await readOpen(fd, name);
  } finally {
    await closeFile(fd);
  }
}

async function readOpen(fd: number, name: string): Promise<Uint8Array<ArrayBuffer>> {
  const buffer = new Uint8Array(MOST_BYTES + 1);
  try {
    for (let length = 0; length <= MOST_BYTES;) {
      const { bytesRead } = await readFile(fd, buffer, length, buffer.length - length, null);
      if (bytesRead === 0) return buffer.slice(0, length);
      length += bytesRead;
    }
  } catch (error) {
    throw isRawSystemError(error) ? systemError(error, name) : error;
  } finally {
    buffer.fill(0);
  }
  throw usageError(`the secret is longer than ${MOST_BYTES} bytes`, 'name the file that holds the key', { path: name });
}
