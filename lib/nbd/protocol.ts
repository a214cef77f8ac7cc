/**
 * Numbers and layouts of the NBD protocol (fixed newstyle, simple and structured replies), as
 * functions over bytes. All integers are big-endian.
 */
export const HELLO_MAGIC = 0x4e42444d41474943n;
export const OPTION_MAGIC = 0x49484156454f5054n;
export const OLDSTYLE_MAGIC = 0x00420281861253n;
const OPTION_REPLY_MAGIC = 0x0003e889045565a9n;
const REQUEST_MAGIC = 0x25609513;
export const SIMPLE_MAGIC = 0x67446698;
export const STRUCTURED_MAGIC = 0x668e33ef;

/** Both sides' handshake flags have the same bits. */
export const HANDSHAKE = { fixedNewstyle: 1, noZeroes: 2 } as const;

export const OPTION = {
  EXPORT_NAME: 1,
  ABORT: 2,
  LIST: 3,
  STARTTLS: 5,
  GO: 7,
  STRUCTURED_REPLY: 8,
  LIST_META_CONTEXT: 9,
  SET_META_CONTEXT: 10,
} as const;
export type OptionName = keyof typeof OPTION;

export const REPLY = { ACK: 1, SERVER: 2, INFO: 3, META_CONTEXT: 4 } as const;
export const REPLY_ERROR = 2 ** 31;
const REPLY_ERRORS: Record<number, string> = {
  1: 'UNSUP',
  2: 'POLICY',
  3: 'INVALID',
  4: 'PLATFORM',
  5: 'TLS_REQD',
  6: 'UNKNOWN',
  7: 'SHUTDOWN',
  8: 'BLOCK_SIZE_REQD',
  9: 'TOO_BIG',
  10: 'EXT_HEADER_REQD',
};

export function replyErrorName(type: number): string {
  return REPLY_ERRORS[type - REPLY_ERROR] ?? `error ${type - REPLY_ERROR}`;
}

export const INFO = { EXPORT: 0, NAME: 1, DESCRIPTION: 2, BLOCK_SIZE: 3 } as const;

export const COMMAND = {
  READ: 0,
  WRITE: 1,
  DISC: 2,
  FLUSH: 3,
  CACHE: 5,
  WRITE_ZEROES: 6,
  BLOCK_STATUS: 7,
} as const;
export type CommandName = keyof typeof COMMAND;

export const COMMAND_FLAG = { FUA: 1, NO_HOLE: 2, REQ_ONE: 8, FAST_ZERO: 16 } as const;

export const CHUNK = {
  NONE: 0,
  OFFSET_DATA: 1,
  OFFSET_HOLE: 2,
  BLOCK_STATUS: 5,
  ERROR: 0x8001,
  ERROR_OFFSET: 0x8002,
} as const;
export const CHUNK_DONE = 1;
/** Of chunk types: all that have it are errors, also those that a client doesn't know. */
export const CHUNK_ERROR_BIT = 0x8000;

/** Bits of a `base:allocation` extent's flags. */
export const STATE_HOLE = 1;
export const STATE_ZERO = 2;

/** The longest string of the protocol; bytes. */
export const MOST_STRING = 4096;
/** Lengths are 32 bits on the wire. */
export const MOST_LENGTH = 2 ** 32 - 1;

export const HELLO_BYTES = 18;
export const OPTION_REPLY_BYTES = 20;
export const REQUEST_BYTES = 28;
export const SIMPLE_BYTES = 16;
export const STRUCTURED_BYTES = 20;

export interface ExportFlags {
  readOnly: boolean;
  flush: boolean;
  fua: boolean;
  rotational: boolean;
  trim: boolean;
  writeZeroes: boolean;
  df: boolean;
  multiConn: boolean;
  resize: boolean;
  cache: boolean;
  fastZero: boolean;
}

/** Without the lowest bit, HAS_FLAGS, none of the others counts. */
export function decodeExportFlags(bits: number): ExportFlags {
  const has = (bit: number) => (bits & 1) !== 0 && (bits & (1 << bit)) !== 0;
  return {
    readOnly: has(1),
    flush: has(2),
    fua: has(3),
    rotational: has(4),
    trim: has(5),
    writeZeroes: has(6),
    df: has(7),
    multiConn: has(8),
    resize: has(9),
    cache: has(10),
    fastZero: has(11),
  };
}

export interface BlockSize {
  /** Bytes; offsets and lengths are multiples of it. */
  minimum: number;
  /** Bytes; what the server works with best. */
  preferred: number;
  /** Bytes; the longest READ, WRITE and CACHE. */
  maximum: number;
}

/** What holds where a server says nothing. */
export const DEFAULT_BLOCK_SIZE: BlockSize = { minimum: 1, preferred: 4096, maximum: 2 ** 25 };

export function encodeClientFlags(flags: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(flags);
  return bytes;
}

export function encodeOption(option: number, data: Buffer = Buffer.alloc(0)): Buffer {
  const head = Buffer.alloc(16);
  head.writeBigUInt64BE(OPTION_MAGIC, 0);
  head.writeUInt32BE(option, 8);
  head.writeUInt32BE(data.length, 12);
  return Buffer.concat([head, data]);
}

export function encodeString(text: string): Buffer {
  const bytes = Buffer.from(text);
  const head = Buffer.alloc(4);
  head.writeUInt32BE(bytes.length);
  return Buffer.concat([head, bytes]);
}

/** Data of GO: an export's name and the kinds of information that are wanted. */
export function encodeGo(exportName: string, infos: readonly number[]): Buffer {
  const tail = Buffer.alloc(2 + 2 * infos.length);
  tail.writeUInt16BE(infos.length, 0);
  infos.forEach((info, i) => tail.writeUInt16BE(info, 2 + 2 * i));
  return Buffer.concat([encodeString(exportName), tail]);
}

/** Data of SET_META_CONTEXT and LIST_META_CONTEXT. */
export function encodeMetaQuery(exportName: string, queries: readonly string[]): Buffer {
  const count = Buffer.alloc(4);
  count.writeUInt32BE(queries.length);
  return Buffer.concat([encodeString(exportName), count, ...queries.map(encodeString)]);
}

export interface OptionReplyHead {
  option: number;
  type: number;
  /** Bytes of data that follow. */
  length: number;
}

/** Null where the magic number is wrong. */
export function decodeOptionReplyHead(bytes: Buffer): OptionReplyHead | null {
  if (bytes.readBigUInt64BE(0) !== OPTION_REPLY_MAGIC) return null;
  return {
    option: bytes.readUInt32BE(8),
    type: bytes.readUInt32BE(12),
    length: bytes.readUInt32BE(16),
  };
}

/** Null where it is malformed. */
export function decodeInfoExport(data: Buffer): { size: bigint; flags: number } | null {
  if (data.length !== 12) return null;
  return { size: data.readBigUInt64BE(2), flags: data.readUInt16BE(10) };
}

const isPowerOfTwo = (value: number) => Number.isInteger(Math.log2(value));

/** Null where it is malformed, or the sizes contradict each other. */
export function decodeInfoBlockSize(data: Buffer): BlockSize | null {
  if (data.length !== 14) return null;
  const minimum = data.readUInt32BE(2);
  const preferred = data.readUInt32BE(6);
  const maximum = data.readUInt32BE(10);
  if (!isPowerOfTwo(minimum) || minimum > 65536) return null;
  if (!isPowerOfTwo(preferred) || preferred < minimum) return null;
  if (maximum < minimum) return null;
  if (maximum !== MOST_LENGTH && maximum % minimum !== 0) return null;
  return { minimum, preferred, maximum: maximum - (maximum % minimum) };
}

/** A META_CONTEXT reply; null where it is malformed. */
export function decodeMetaContext(data: Buffer): { id: number; name: string } | null {
  if (data.length < 5 || data.length > 4 + MOST_STRING) return null;
  return { id: data.readUInt32BE(0), name: data.toString('utf8', 4) };
}

/** A SERVER reply: an export's name and, after it, words for people; null where it is malformed. */
export function decodeServer(data: Buffer): { name: string; description: string } | null {
  if (data.length < 4) return null;
  const end = 4 + data.readUInt32BE(0);
  if (end > data.length || end > 4 + MOST_STRING) return null;
  return { name: data.toString('utf8', 4, end), description: data.toString('utf8', end) };
}

/** A request's head into 28 bytes of `bytes`. The cookie is `generation` above `slot`. */
export function encodeRequest(
  bytes: Buffer,
  flags: number,
  command: number,
  generation: number,
  slot: number,
  offset: number,
  length: number,
): void {
  bytes.writeUInt32BE(REQUEST_MAGIC, 0);
  bytes.writeUInt16BE(flags, 4);
  bytes.writeUInt16BE(command, 6);
  bytes.writeUInt32BE(generation, 8);
  bytes.writeUInt32BE(slot, 12);
  bytes.writeUInt32BE(Math.floor(offset / 2 ** 32), 16);
  bytes.writeUInt32BE(offset % 2 ** 32, 20);
  bytes.writeUInt32BE(length, 24);
}

/** An offset of 64 bits at `at`; Infinity where a number can't hold it exactly. */
export function decodeOffset(bytes: Uint8Array, at: number): number {
  const high = decodeUint32(bytes, at);
  return high < 2 ** 21 ? high * 2 ** 32 + decodeUint32(bytes, at + 4) : Infinity;
}

export function decodeUint32(bytes: Uint8Array, at: number): number {
  return (
    ((bytes[at]! << 24) | (bytes[at + 1]! << 16) | (bytes[at + 2]! << 8) | bytes[at + 3]!) >>> 0
  );
}

export function decodeUint16(bytes: Uint8Array, at: number): number {
  return (bytes[at]! << 8) | bytes[at + 1]!;
}

/** The payload of an error chunk; null where it is malformed or names no error. */
export function decodeErrorChunk(
  bytes: Buffer,
  withOffset: boolean,
): { errno: number; message: string; offset: number | undefined } | null {
  if (bytes.length < 6) return null;
  const errno = bytes.readUInt32BE(0);
  const end = 6 + bytes.readUInt16BE(4);
  if (errno === 0 || end + (withOffset ? 8 : 0) !== bytes.length) return null;
  const offset = withOffset ? decodeOffset(bytes, end) : undefined;
  return { errno, message: bytes.toString('utf8', 6, end), offset };
}
