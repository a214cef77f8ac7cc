/** What the first bytes of an image say. */
import { read } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from './descriptor.js';
import { formatOf, PROBE_LENGTH, type Format } from './format.js';

const readFile = promisify(read);

export interface Probe {
  head: Buffer;
  format: Format;
}

/** `stated` is the caller's word, and final. Throws USAGE, or the errno's name. */
export async function probe(descriptor: Descriptor, stated: string | undefined): Promise<Probe> {
  const head = Buffer.alloc(PROBE_LENGTH);
  await descriptor.use((fd) => readFile(fd, head, 0, PROBE_LENGTH, 0));
  return { head, format: formatOf(descriptor.path, head, stated) };
}
