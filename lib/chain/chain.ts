/**
 * The layers of an image, opened one by one by thicken itself: what is opened, and as what, is decided
 * here, and the storage daemon is given what is open (safety rule 7).
 */
import type { Stats } from 'node:fs';
import { fstat } from 'node:fs';
import { stat } from 'node:fs/promises';
import { resolve } from 'node:path';
import { promisify } from 'node:util';
import { Descriptor, READ_ONLY } from '../descriptor.js';
import { ThickenError } from '../errors.js';
import { native } from '../native.js';
import type { NbdUri } from '../nbd/uri.js';
import type { Secret } from '../secret.js';
import { chainErrors } from './errors.js';
import { hasBacking, readHeader, type HeaderFacts } from './header.js';
import { placeOf, type Place } from './name.js';
import { servedSize } from './served.js';

const statOf = promisify(fstat);

/** Layers below the image. QEMU 7.2 bears 200; libvirt allows as many. */
export const MOST_LAYERS = 200;

/** Formats of one file that lie on no other. */
const PLAIN = new Set(['raw', 'vdi', 'vhdx', 'vpc', 'parallels']);

/** One image of a chain. */
export interface Layer {
  /** As people know it: a path, or the address of a server. */
  path: string;
  format: string;
  /** Open for reading; or the server that has it. */
  source: { kind: 'file' | 'block'; file: Descriptor } | { kind: 'nbd'; uri: NbdUri };
  /** An external data file, open for reading. */
  dataFile: Descriptor | null;
  /** Bytes; null where only QEMU can tell. */
  virtualSize: number | null;
  /** Of formats that `hasBacking`. */
  header: HeaderFacts | null;
}

export interface ChainOptions {
  /** The format of layers whose parent does not record it. */
  backingFormat?: string | undefined;
  /** A folder of certificates for servers that want TLS. */
  tlsCertificates?: string | undefined;
  /** The key of all encrypted layers. */
  secret?: Secret | null;
}

/** From the image itself down. */
export class Chain implements AsyncDisposable {
  private constructor(
    readonly layers: readonly Layer[],
    /** The key of those that are encrypted, where it is known. */
    readonly secret: Secret | null,
  ) {}

  /**
   * Opens what lies below an image of a format that `hasBacking`; by the caller's word, not by a
   * probe. `file` stays the caller's. Throws BACKING_FORMAT, BACKING_REFUSED, BACKING_MISSING,
   * BACKING_LOOP, BACKING_DEPTH, DAMAGED, UNSUPPORTED, and SECRET_REQUIRED for an encrypted layer below.
   */
  static async open(file: Descriptor, format: string, options: ChainOptions = {}): Promise<Chain> {
    await using opening = new Opening(file, options);
    await opening.addAll(format);
    return new Chain(opening.keep(), options.secret ?? null);
  }

  get top(): Layer {
    return this.layers[0]!;
  }

  /** From the next layer down to the last. */
  get below(): readonly Layer[] {
    return this.layers.slice(1);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await closeAll(this.layers);
  }
}

/** The first layer's file is the caller's. */
async function closeAll(layers: readonly Layer[]): Promise<void> {
  for (const [i, { source, dataFile }] of layers.entries()) {
    if (i > 0 && source.kind !== 'nbd') await source.file.close();
    await dataFile?.close();
  }
}

class Opening implements AsyncDisposable {
  private layers: Layer[] = [];
  private readonly seen = new Set<string>();

  constructor(
    private readonly file: Descriptor,
    private readonly options: ChainOptions,
  ) {}

  async addAll(format: string): Promise<void> {
    const facts = await this.file.use((fd) => statOf(fd));
    this.seen.add(identityOf(facts));
    const kind = facts.isBlockDevice() ? 'block' : 'file';
    let below = await this.add({ kind, file: this.file }, this.file.path, format);
    while (below) {
      if (this.layers.length > MOST_LAYERS) throw chainErrors.tooDeep(this.file.path, MOST_LAYERS);
      below = await this.addBelow(below, this.layers.at(-1)!.path);
    }
  }

  /** Takes over what is open; tells what lies below. */
  private async add(source: Layer['source'], path: string, format: string): Promise<HeaderFacts['backing']> {
    const layer: Layer = { path, format, source, dataFile: null, virtualSize: null, header: null };
    // From here on it is closed with the rest.
    this.layers.push(layer);
    if (source.kind === 'nbd' || !hasBacking(format)) {
      if (format === 'raw') layer.virtualSize = await sizeOf(source, path);
      return null;
    }
    const header = await readHeader(source.file, format);
    this.checkKey(header, path, format);
    layer.header = header;
    layer.virtualSize = header.virtualSize;
    if (header.dataFile !== null) layer.dataFile = await this.openDataFile(header.dataFile, path);
    return header.backing;
  }

  /** The image itself may be looked at without: what lies below it is what the daemon opens then. */
  private checkKey({ encryption }: HeaderFacts, path: string, format: string): void {
    if (encryption === 'aes') throw chainErrors.unsupported(path, format, 'it is encrypted in a way that QEMU has given up');
    if (encryption === 'luks' && !this.options.secret && this.layers.length > 1) throw chainErrors.secretWanted(path);
  }

  private async addBelow({ name, format: recorded }: NonNullable<HeaderFacts['backing']>, above: string) {
    const place = placeOf(name, above);
    const format = recorded ?? this.options.backingFormat;
    if (format === undefined) throw chainErrors.noFormat(above, name);
    if (!PLAIN.has(format) && !hasBacking(format)) {
      throw chainErrors.unsupported(above, format, 'it is the backing file’s, by the image’s word');
    }
    if (place.kind === 'nbd') return this.addServed(place, format, above);
    const opened = await this.openFile(place, name, above);
    return this.add(opened, place.path, format);
  }

  private addServed({ uri, name }: Extract<Place, { kind: 'nbd' }>, format: string, above: string) {
    const { tlsCertificates } = this.options;
    // To QEMU it may give another header than to us, and whatever file that one names QEMU opens.
    if (format !== 'raw') throw chainErrors.unsupported(above, format, 'an NBD server has to serve raw content');
    if (uri.tls && tlsCertificates === undefined) throw chainErrors.certificatesWanted(above, name);
    const known = uri.tls && tlsCertificates !== undefined ? { ...uri, tlsCertificates: resolve(tlsCertificates) } : uri;
    return this.add({ kind: 'nbd', uri: known }, name, format);
  }

  /** Looked at before it is opened: a loop is none that is opened again. */
  private async openFile({ path }: Extract<Place, { kind: 'file' }>, name: string, above: string) {
    try {
      const facts = await stat(path);
      if (!facts.isFile() && !facts.isBlockDevice()) {
        throw chainErrors.refused(above, name, 'it is neither a file nor a block device');
      }
      const identity = identityOf(facts);
      if (this.seen.has(identity)) throw chainErrors.loop(above, name);
      this.seen.add(identity);
      const file = await Descriptor.openSame(path, READ_ONLY, facts);
      return { kind: facts.isFile() ? ('file' as const) : ('block' as const), file };
    } catch (error) {
      throw missing(error, above, name);
    }
  }

  private async openDataFile(name: string, above: string): Promise<Descriptor> {
    const place = placeOf(name, above);
    if (place.kind === 'nbd') throw chainErrors.refused(above, name, 'a data file has to be a file');
    const { kind, file } = await this.openFile(place, name, above);
    if (kind === 'file') return file;
    await file.close();
    throw chainErrors.refused(above, name, 'a data file has to be a file');
  }

  keep(): Layer[] {
    const { layers } = this;
    this.layers = [];
    return layers;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return closeAll(this.layers);
  }
}

function identityOf(facts: Stats): string {
  return facts.isBlockDevice() ? `device ${facts.rdev}` : `${facts.dev} ${facts.ino}`;
}

/** Bytes of a raw image; null of a server that is left to the daemon. */
async function sizeOf(source: Layer['source'], path: string): Promise<number | null> {
  // A handshake by TLS that fails can hang the daemon for a minute (7.2): ours comes first.
  if (source.kind === 'nbd') return source.uri.tls ? servedSize(source.uri, path) : null;
  const { kind, file } = source;
  if (kind === 'file') return (await file.use((fd) => statOf(fd))).size;
  return (await file.use((fd) => native().deviceFacts(fd))).size;
}

function missing(error: unknown, above: string, name: string): unknown {
  if (error instanceof ThickenError && error.errno === undefined) return error;
  const { code = 'unknown', errno, syscall } = error as NodeJS.ErrnoException;
  if (errno === undefined) return error;
  return chainErrors.missing(above, name, code, { errno: Math.abs(errno), syscall, cause: error });
}
