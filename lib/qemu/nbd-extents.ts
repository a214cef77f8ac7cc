/** Extents as an NBD server tells them. */
import {
  ABSENT,
  BACKED_DATA,
  BACKED_ZERO,
  BACKED_ZEROED,
  OWN_DATA,
  OWN_ZERO,
  OWN_ZEROED,
  UNALLOCATED,
  type ExtentPage,
} from '../extent.js';
import { ToldExtents } from '../extent-source.js';
import { ALLOCATION_DEPTH, BASE_ALLOCATION, type NbdClient } from '../nbd/client.js';
import { STATE_HOLE, STATE_ZERO } from '../nbd/protocol.js';
import { pagesUntil, type StatusPage } from '../nbd/status-stream.js';
import type { CancelFlag } from '../native.js';
import type { ByteRange } from '../types.js';

/** QEMU looks a request up in the thread of the guest's I/O. */
const STEP = 128 * 2 ** 20;
const CONTEXTS = [BASE_ALLOCATION, ALLOCATION_DEPTH];

export class NbdExtents extends ToldExtents {
  constructor(
    private readonly nbd: NbdClient,
    /** Layers below the image, as they are now. */
    private readonly layersBelow: () => number,
    /** Which layer it is that is exported: 0 is the image itself. */
    private readonly first = 0,
  ) {
    super();
  }

  async *pages(range: ByteRange, cancel?: CancelFlag): AsyncGenerator<ExtentPage, void, undefined> {
    const below = this.layersBelow();
    const pages = pagesUntil(cancel?.signal, this.nbd, range, { contexts: CONTEXTS, step: STEP });
    for await (const page of pages) yield extentsOf(page, below, this.first);
  }
}

/** Of QEMU's allocation depth, 0: no layer has it; 1: what is exported; 2 and more: a layer below. */
export function extentsOf(page: StatusPage, below: number, first = 0): ExtentPage {
  const [base, depths] = page.flags;
  const count = page.length.length;
  const state = new Uint8Array(count);
  const depth = new Uint32Array(count);
  for (let i = 0; i < count; i++) {
    const layer = depths![i]! && depths![i]! + first;
    state[i] = stateOf(layer, base![i]!, below);
    depth[i] = layer === 0 ? below : layer - 1;
  }
  return { offset: page.offset, length: page.length, state, flags: new Uint32Array(count), depth };
}

/** What is no hole there is mapped to storage, whatever it reads as (QEMU, nbd/server.c). */
function stateOf(layer: number, flags: number, below: number): number {
  if (layer === 0) return below > 0 ? ABSENT : UNALLOCATED;
  const own = layer === 1;
  if ((flags & STATE_ZERO) === 0) return own ? OWN_DATA : BACKED_DATA;
  if ((flags & STATE_HOLE) === 0) return own ? OWN_ZEROED : BACKED_ZEROED;
  return own ? OWN_ZERO : BACKED_ZERO;
}
