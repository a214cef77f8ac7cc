/** A qcow2 image as its header and tables tell of it; read only. */
import { fstat } from 'node:fs';
import { promisify } from 'node:util';
import type { Descriptor } from '../descriptor.js';
import { rangeError } from '../errors.js';
import { isLacking, type FileExtents } from '../extent-source.js';
import {
  EXTENT_METHODS,
  native,
  type CancelFlag,
  type HostFiles,
  type Qcow2Facts,
} from '../native.js';
import { throwIfRefused } from './errors.js';

const factsOfFile = promisify(fstat);

/** The files of an image; `data` is its external data file, where it has one that is open. */
export interface Qcow2Files {
  file: FileExtents;
  data: FileExtents | null;
}

/**
 * Runs `work` with all that is open, which stays so until it ends; again where a file system turns out to
 * tell of holes only.
 */
export async function withFiles<T>(files: Qcow2Files, work: (files: HostFiles) => Promise<T>): Promise<T> {
  try {
    return await withOpened(files, work);
  } catch (error) {
    if (!turnToSeek(files, error)) throw error;
    return withOpened(files, work);
  }
}

function turnToSeek({ file, data }: Qcow2Files, error: unknown): boolean {
  if (!isLacking(error)) return false;
  const able = [file, ...(data ? [data] : [])].filter(({ method }) => method !== 'seek');
  for (const extents of able) extents.method = 'seek';
  return able.length > 0;
}

function withOpened<T>({ file, data }: Qcow2Files, work: (files: HostFiles) => Promise<T>): Promise<T> {
  const method = EXTENT_METHODS.indexOf(file.method);
  return file.file.use((fd) => {
    if (!data) return work({ fd, method, dataFd: -1, dataMethod: method });
    const dataMethod = EXTENT_METHODS.indexOf(data.method);
    return data.file.use((dataFd) => work({ fd, method, dataFd, dataMethod }));
  });
}

export class Qcow2Reader {
  private readonly tables = new (native().Qcow2Tables)();

  private constructor(
    private readonly descriptor: Descriptor,
    public facts: Qcow2Facts,
  ) {}

  /** Throws NOT_QCOW2, UNSUPPORTED, QCOW2_*, RANGE, or the errno's name. */
  static async open(descriptor: Descriptor): Promise<Qcow2Reader> {
    const reader = new Qcow2Reader(descriptor, {} as Qcow2Facts);
    await reader.refresh();
    return reader;
  }

  /** Reads header and first-level tables anew. */
  async refresh(): Promise<void> {
    const { path } = this.descriptor;
    const facts = await this.descriptor.use((fd) => native().openQcow2(this.tables, fd));
    throwIfRefused(facts, path);
    if (!Number.isSafeInteger(facts.virtualSize)) {
      throw rangeError('the virtual disk is larger than 2^53-1 bytes', 'no larger one can be dealt with', { path });
    }
    this.facts = facts;
  }

  /** One page of the map, joined with the host's extents. */
  async read(files: HostFiles, offset: number, end: number, most: number, cancel?: CancelFlag) {
    const page = await native().readQcow2(this.tables, files, offset, end, most, cancel);
    throwIfRefused(page, this.descriptor.path);
    return page;
  }

  /** Whether clusters are mapped to fewer blocks than they take: `qemu-img map` asks the host then. */
  async looksPreallocated(): Promise<boolean> {
    return this.descriptor.use(async (fd) => {
      const { blocks } = await factsOfFile(fd);
      return native().looksPreallocatedQcow2(this.tables, fd, blocks * 512);
    });
  }

  close(): void {
    this.tables.close();
  }
}
