/** Reads the headers of the formats whose images may lie on others. Opens nothing. */
import { read } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from '../descriptor.js';
import { chainErrors } from './errors.js';
import { BadHeader, NamesFiles, type HeaderFacts, type ReadBytes } from './facts.js';
import { readQcow2 } from './qcow2.js';
import { readQed } from './qed.js';
import { readVmdk } from './vmdk.js';

export type { HeaderFacts } from './facts.js';

const readFile = promisify(read);

const READERS: Record<string, (bytes: ReadBytes) => Promise<HeaderFacts>> = {
  qcow2: readQcow2,
  qed: readQed,
  vmdk: readVmdk,
};

/** Whether images of the format may lie on others. */
export function hasBacking(format: string): boolean {
  return Object.hasOwn(READERS, format);
}

/** Of a format that `hasBacking`. Throws DAMAGED, or BACKING_REFUSED where it spreads over several files. */
export async function readHeader(file: Descriptor, format: string): Promise<HeaderFacts> {
  const bytes: ReadBytes = async (offset, length) => {
    const buffer = Buffer.alloc(length);
    const { bytesRead } = await file.use((fd) => readFile(fd, buffer, 0, length, offset));
    return buffer.subarray(0, bytesRead);
  };
  try {
    return await READERS[format]!(bytes);
  } catch (error) {
    if (error instanceof BadHeader) throw chainErrors.damaged(file.path, format, error.message);
    if (error instanceof NamesFiles) throw chainErrors.namesFiles(file.path, error.message);
    throw error;
  }
}
