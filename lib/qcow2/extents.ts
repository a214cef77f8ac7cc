/** The two-level map of a qcow2 image: guest extents, and the host's where they are mapped to. */
import type { ExtentSource } from '../extent-source.js';
import type { CancelFlag } from '../native.js';
import { PAGES_AHEAD, readAhead } from '../read-ahead.js';
import type { ByteRange } from '../types.js';
import { withFiles, type Qcow2Files, type Qcow2Reader } from './tables.js';

const PAGE_EXTENTS = 4096;

export class Qcow2Extents implements ExtentSource {
  constructor(
    private readonly reader: Qcow2Reader,
    readonly files: Qcow2Files,
  ) {}

  get method() {
    return this.files.file.method;
  }

  get filesystem() {
    return this.files.file.filesystem;
  }

  get file() {
    return this.files.file.file;
  }

  pages(range: ByteRange, cancel?: CancelFlag) {
    return readAhead(range, PAGES_AHEAD, (offset, end) => this.page(offset, end, cancel));
  }

  /** From `offset` on: to `end`, or as far as some thousand extents reach. */
  page(offset: number, end: number, cancel?: CancelFlag) {
    return withFiles(this.files, (files) => this.reader.read(files, offset, end, PAGE_EXTENTS, cancel));
  }

  /** The files belong to whoever opened them. */
  async [Symbol.asyncDispose](): Promise<void> {}
}
