/**
 * Where in the file of its layer lies what an image has from below: QEMU's map over NBD does not tell. Known
 * of raw layers, and of qcow2 layers by their tables. All is read by what the chain has open.
 */
import type { Descriptor } from '../descriptor.js';
import { ThickenError } from '../errors.js';
import { ABSENT, type ExtentPage } from '../extent.js';
import { FileExtents } from '../extent-source.js';
import { readFilesystem } from '../filesystem.js';
import { PageBuilder } from '../page-builder.js';
import { Qcow2Extents } from '../qcow2/extents.js';
import { Qcow2Reader } from '../qcow2/tables.js';
import { endOf, roundUp } from '../range.js';
import type { ByteRange } from '../types.js';
import type { Chain, Layer } from './chain.js';

/** A file that ends within one is zeros to the end of it. */
const SECTOR = 512;
/** A part of an extent may be spread over any number of clusters. */
const PAGE_EXTENTS = 4096;

/** Bytes of a layer that does not tell its size by itself. */
export type SizeOf = (depth: number) => Promise<number>;

/** The same pages, cut where what comes from below lies elsewhere in its layer's file. */
export async function* placed(
  pages: AsyncIterable<ExtentPage>,
  { layers }: Chain,
  range: ByteRange,
  sizeOf: SizeOf,
): AsyncGenerator<ExtentPage, void, undefined> {
  const places = new Map<number, Places>();
  const placesOf = async (depth: number) => {
    const known = places.get(depth) ?? (await placesIn(layers[depth], endOf(range), () => sizeOf(depth)));
    places.set(depth, known);
    return known;
  };
  try {
    for await (const page of pages) yield* placePage(page, placesOf);
  } finally {
    for (const known of places.values()) known.close();
  }
}

async function* placePage(page: ExtentPage, placesOf: (depth: number) => Promise<Places>) {
  let built = new PageBuilder();
  for (let i = 0; i < page.offset.length; i++) {
    const depth = page.depth?.[i] ?? 0;
    if (depth === 0) {
      built.addWhole(page, i);
      continue;
    }
    const end = page.offset[i]! + page.length[i]!;
    for await (const { offset, length, at } of partsOf(await placesOf(depth), page.offset[i]!, end, page.state[i]!)) {
      built.add(offset, length, page, i, at);
      if (built.count < PAGE_EXTENTS) continue;
      yield built.page();
      built = new PageBuilder();
    }
  }
  if (built.count > 0) yield built.page();
}

interface Part extends ByteRange {
  /** Where it lies; -1 for nowhere, or not known. */
  at: number;
}

/** A range of one state, in parts that lie in one piece each. */
async function* partsOf(places: Places, from: number, end: number, state: number): AsyncGenerator<Part> {
  let part: Part = { offset: from, length: 0, at: -1 };
  for (let offset = from; offset < end;) {
    const found = await places.find(offset, state);
    const length = Math.min(found.end, end) - offset;
    if (part.length > 0 && !continues(part, found.at)) {
      yield part;
      part = { offset, length: 0, at: -1 };
    }
    if (part.length === 0) part.at = found.at;
    part.length += length;
    offset += length;
  }
  yield part;
}

function continues({ at, length }: Part, next: number): boolean {
  return next === (at < 0 ? -1 : at + length);
}

interface Places {
  /** Where the byte at `offset` lies, which is of that state, and up to which end the same goes on. */
  find(offset: number, state: number): Promise<{ at: number; end: number }>;
  close(): void;
}

const NOWHERE = { at: -1, end: Infinity };

const UNKNOWN_PLACES: Places = { find: () => Promise.resolve(NOWHERE), close: () => undefined };

/** Each byte where it is in the disk, up to the end of the layer, from where on QEMU gives it zeros. */
function rawPlaces(size: number): Places {
  const end = roundUp(size, SECTOR);
  return {
    find: (offset, state) => Promise.resolve(state === ABSENT || offset >= end ? NOWHERE : { at: offset, end }),
    close: () => undefined,
  };
}

async function placesIn(layer: Layer | undefined, end: number, sizeOf: () => Promise<number>): Promise<Places> {
  if (layer?.format === 'raw') return rawPlaces(layer.virtualSize ?? (await sizeOf()));
  // Where an encrypted cluster lies is nothing to read it from: QEMU does not tell it, either.
  if (layer?.format !== 'qcow2' || layer.source.kind === 'nbd' || layer.header?.encryption) return UNKNOWN_PLACES;
  return new Qcow2Places(layer.source.file, Math.min(end, layer.virtualSize ?? 0));
}

/** By the layer's own tables, page by page: ascending offsets read each of them once. */
class Qcow2Places implements Places {
  private reader: Qcow2Reader | undefined;
  private extents: Qcow2Extents | undefined;
  private page: (ExtentPage & { next: number }) | null = null;
  private index = 0;
  /** Whether the layer is one that only QEMU can read. */
  private unreadable = false;

  constructor(
    private readonly file: Descriptor,
    /** Of what is asked for, or of the layer: whichever comes first. */
    private readonly end: number,
  ) {}

  async find(offset: number): Promise<{ at: number; end: number }> {
    if (offset >= this.end || this.unreadable) return NOWHERE;
    try {
      if (!this.page || offset < this.page.offset[0]! || offset >= this.page.next) await this.load(offset);
    } catch (error) {
      if (!(error instanceof ThickenError) || error.errno !== undefined) throw error;
      this.unreadable = true;
      return NOWHERE;
    }
    return this.look(this.page!, offset);
  }

  private async load(offset: number): Promise<void> {
    this.extents ??= await this.open();
    this.page = await this.extents.page(offset, this.end);
    this.index = 0;
  }

  private async open(): Promise<Qcow2Extents> {
    this.reader = await Qcow2Reader.open(this.file);
    return new Qcow2Extents(this.reader, { file: new FileExtents(this.file, await readFilesystem(this.file)), data: null });
  }

  private look({ offset: starts, length, host }: ExtentPage, offset: number): { at: number; end: number } {
    if (starts[this.index]! > offset) this.index = 0;
    while (starts[this.index]! + length[this.index]! <= offset) this.index++;
    const start = starts[this.index]!;
    const at = host?.[this.index] ?? -1;
    return { at: at < 0 ? -1 : at + offset - start, end: start + length[this.index]! };
  }

  close(): void {
    this.reader?.close();
  }
}
