/** The map of an image in a format that QEMU writes: as for any node, but with its own side told apart. */
import {
  ABSENT,
  OWN_DATA,
  OWN_ZERO,
  OWN_ZEROED,
  SERVED_DATA,
  SERVED_ZEROED,
  UNALLOCATED,
  UNKNOWN,
  type ExtentPage,
} from '../extent.js';
import { ToldExtents, type ExtentSource } from '../extent-source.js';
import { PLAIN_ZEROS, UNMAPPED } from '../mapped.js';
import type { CancelFlag } from '../native.js';
import type { ByteRange } from '../types.js';

/** What is mapped is served by the file, whose host blocks are looked at as a whole. */
const STORED = new Map([
  [ABSENT, UNMAPPED],
  [UNALLOCATED, UNMAPPED],
  [OWN_ZERO, PLAIN_ZEROS],
  [OWN_DATA, SERVED_DATA],
  [OWN_ZEROED, SERVED_ZEROED],
]);

export class StoredSource extends ToldExtents {
  constructor(
    private readonly below: ExtentSource,
    /** Whether QEMU tells what the format maps: of VHDX it calls all data (7.2). */
    private readonly tells: boolean,
  ) {
    super();
  }

  async *pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined> {
    for await (const page of this.below.pages(range, cancel)) {
      const state = this.tells
        ? page.state.map((of) => STORED.get(of) ?? of)
        : new Uint8Array(page.state.length).fill(UNKNOWN);
      yield { ...page, state };
    }
  }
}
