/** The external data file of an image: another file, opened only where the caller states the format. */
import { stat } from 'node:fs/promises';
import { dirname, resolve } from 'node:path';
import { Descriptor, READ_ONLY } from '../descriptor.js';
import { isRawSystemError, systemError } from '../errors.js';
import { FileExtents } from '../extent-source.js';
import { readFilesystem } from '../filesystem.js';
import type { Qcow2Facts } from '../native.js';
import { qcow2Errors } from './errors.js';

/**
 * Opens it by the name that the image records, relative to the image. Throws UNSUPPORTED, CHANGED, or
 * the errno's name.
 */
export async function openDataFile(image: Descriptor, { dataFile }: Qcow2Facts): Promise<FileExtents> {
  if (dataFile === null) throw qcow2Errors.dataFileUnknown(image.path);
  // As QEMU tells a protocol from a path: a colon before any slash.
  if (/^[^/]*:/.test(dataFile) && !dataFile.startsWith('file:')) {
    throw qcow2Errors.dataFileElsewhere(image.path, dataFile);
  }
  const path = resolve(dirname(image.path), dataFile.replace(/^file:/, ''));
  const facts = await stat(path).catch((error: unknown) => {
    throw isRawSystemError(error) ? systemError(error, path) : error;
  });
  if (!facts.isFile()) throw qcow2Errors.dataFileElsewhere(image.path, dataFile);
  const file = await Descriptor.openSame(path, READ_ONLY, facts);
  try {
    return new FileExtents(file, await readFilesystem(file));
  } catch (error) {
    await file.close();
    throw error;
  }
}
