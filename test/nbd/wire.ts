/** The server's half of the protocol's bytes, and of the conversation. */
import { createServer, type Server, type Socket } from 'node:net';
import { Inbox } from '../../lib/nbd/inbox.js';
import { nbdErrors } from '../../lib/nbd/errors.js';
import { hold } from '../support/cleanup.js';
import { scratchPath } from '../support/scratch.js';

const u16 = (value: number) => {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16BE(value);
  return bytes;
};
export const u32 = (value: number) => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};
export const u64 = (value: number | bigint) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64BE(BigInt(value));
  return bytes;
};
const string = (text: string) => Buffer.concat([u32(Buffer.byteLength(text)), Buffer.from(text)]);

export const hello = (flags = 3) =>
  Buffer.concat([Buffer.from('NBDMAGICIHAVEOPT'), u16(flags)]);

export const optionReply = (option: number, type: number, data = Buffer.alloc(0)) =>
  Buffer.concat([u64(0x3e889045565a9n), u32(option), u32(type), u32(data.length), data]);

export const ack = (option: number) => optionReply(option, 1);
export const refusal = (option: number, error: number, text = '') =>
  optionReply(option, 2 ** 31 + error, Buffer.from(text));
export const metaContext = (id: number, name: string, option = 10) =>
  optionReply(option, 4, Buffer.concat([u32(id), Buffer.from(name)]));
export const exportListed = (name: string, description = '') =>
  optionReply(3, 2, Buffer.concat([string(name), Buffer.from(description)]));
export const infoExport = (size: number | bigint, flags: number) =>
  optionReply(7, 3, Buffer.concat([u16(0), u64(size), u16(flags)]));
export const infoBlockSize = (minimum: number, preferred: number, maximum: number) =>
  optionReply(7, 3, Buffer.concat([u16(3), u32(minimum), u32(preferred), u32(maximum)]));

export const simple = (errno: number, cookie: bigint, data = Buffer.alloc(0)) =>
  Buffer.concat([u32(0x67446698), u32(errno), u64(cookie), data]);
export const chunk = (done: boolean, type: number, cookie: bigint, payload = Buffer.alloc(0)) =>
  Buffer.concat([u32(0x668e33ef), u16(done ? 1 : 0), u16(type), u64(cookie), u32(payload.length), payload]);
export const none = (cookie: bigint) => chunk(true, 0, cookie);
export const dataChunk = (done: boolean, cookie: bigint, offset: number | bigint, data: Buffer) =>
  chunk(done, 1, cookie, Buffer.concat([u64(offset), data]));
export const holeChunk = (done: boolean, cookie: bigint, offset: number, length: number) =>
  chunk(done, 2, cookie, Buffer.concat([u64(offset), u32(length)]));
export const statusChunk = (done: boolean, cookie: bigint, id: number, extents: readonly (readonly number[])[]) =>
  chunk(done, 5, cookie, Buffer.concat([u32(id), ...extents.flat().map(u32)]));
export const errorChunk = (done: boolean, cookie: bigint, errno: number, text = '', offset?: number) => {
  const message = Buffer.concat([u32(errno), u16(Buffer.byteLength(text)), Buffer.from(text)]);
  const payload = offset === undefined ? message : Buffer.concat([message, u64(offset)]);
  return chunk(done, offset === undefined ? 0x8001 : 0x8002, cookie, payload);
};

export const SIZE = 2 ** 24;
/** Everything is offered: flush, FUA, trim, write zeroes, DF, multi-conn, cache, fast zero. */
export const ALL_FLAGS = 0b110111101101;
export const CONTEXT_IDS = new Map([[7, 'base:allocation'], [9, 'qemu:allocation-depth']]);

/** A well-behaved server's answer to an option. */
function answers(option: number, structured: boolean): Buffer[] {
  if (option === 8) return [structured ? ack(8) : refusal(8, 1)];
  if (option === 10) return [...[...CONTEXT_IDS].map(([id, name]) => metaContext(id, name)), ack(10)];
  return [infoExport(SIZE, ALL_FLAGS), infoBlockSize(512, 4096, 2 ** 20), ack(7)];
}

/** All that it says in the handshake with a client that asks for contexts. */
export function transcript(structured = true): Buffer[] {
  const options = structured ? [8, 10, 7] : [8, 7];
  return [hello(), ...options.flatMap((option) => answers(option, structured))];
}

export interface WireRequest {
  flags: number;
  command: number;
  cookie: bigint;
  offset: number;
  length: number;
}

export interface Peer {
  socket: Socket;
  send(...parts: Buffer[]): void;
  /** What the client sends, options first. */
  inbox: Inbox;
  option(): Promise<{ option: number; data: Buffer }>;
  /** Answers all options up to GO. */
  handshake(structured?: boolean): Promise<void>;
  request(): Promise<WireRequest>;
}

export interface Fake extends AsyncDisposable {
  socketPath: string;
}

/** A server that does as `talk` says, for every connection; it ends with the test file. */
export async function fakeServer(talk: (peer: Peer) => Promise<void> | void): Promise<Fake> {
  const socketPath = scratchPath('fake');
  const sockets = new Set<Socket>();
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.add(socket);
    socket.on('close', () => sockets.delete(socket));
    // The client may have gone, which is its right.
    Promise.resolve(talk(peerOf(socket))).catch(() => socket.destroy());
  });
  await new Promise<void>((resolve) => server.listen(socketPath, resolve));
  const release = hold({ release: () => close(server, sockets), releaseSync: () => void server.close() });
  return { socketPath, [Symbol.asyncDispose]: release };
}

function close(server: Server, sockets: Set<Socket>): Promise<void> {
  for (const socket of sockets) socket.destroy();
  return new Promise((resolve) => server.close(() => resolve()));
}

function peerOf(socket: Socket): Peer {
  const inbox = new Inbox();
  socket.on('data', (bytes) => inbox.add(bytes as Buffer));
  socket.on('error', () => undefined);
  for (const event of ['end', 'close']) {
    socket.on(event, () => inbox.fail(nbdErrors.lost('the client', event)));
  }
  const option = async () => {
    const head = await inbox.take(16);
    return { option: head.readUInt32BE(8), data: await inbox.take(head.readUInt32BE(12)) };
  };
  const peer: Peer = {
    socket,
    inbox,
    option,
    send: (...parts) => void socket.write(Buffer.concat(parts)),
    handshake: async (structured = true) => {
      peer.send(hello());
      await inbox.take(4);
      for (let last = 0; last !== 7; ) {
        last = (await option()).option;
        peer.send(...answers(last, structured));
      }
    },
    request: async () => {
      const head = await inbox.take(28);
      return {
        flags: head.readUInt16BE(4),
        command: head.readUInt16BE(6),
        cookie: head.readBigUInt64BE(8),
        offset: Number(head.readBigUInt64BE(16)),
        length: head.readUInt32BE(24),
      };
    },
  };
  return peer;
}
