/** The first phase of a connection: options are agreed upon, one at a time. */
import { nbdErrors } from './errors.js';
import { Inbox } from './inbox.js';
import {
  decodeExportFlags,
  decodeInfoBlockSize,
  decodeInfoExport,
  decodeMetaContext,
  decodeOptionReplyHead,
  decodeServer,
  DEFAULT_BLOCK_SIZE,
  encodeClientFlags,
  encodeGo,
  encodeMetaQuery,
  encodeOption,
  HANDSHAKE,
  HELLO_BYTES,
  HELLO_MAGIC,
  INFO,
  MOST_STRING,
  OLDSTYLE_MAGIC,
  OPTION,
  OPTION_MAGIC,
  OPTION_REPLY_BYTES,
  REPLY,
  REPLY_ERROR,
  replyErrorName,
  type BlockSize,
  type ExportFlags,
  type OptionName,
} from './protocol.js';
import type { Transport } from './transport.js';

export interface Negotiated {
  /** Bytes. */
  size: number;
  flags: ExportFlags;
  blockSize: BlockSize;
  /** Whether the server sends structured replies. */
  structured: boolean;
  /** Names of meta contexts by their numbers on this connection. */
  contexts: Map<number, string>;
  /** The export's name as the server has it. */
  exportName: string;
  description: string | null;
}

interface Answer {
  type: number;
  data: Buffer;
}

/** A reply's data is at most two strings and some numbers. */
const MOST_REPLY = 2 * MOST_STRING + 64;
/** Replies to one option; lists are limited by their bytes too. */
const MOST_REPLIES = 64;
const MOST_LISTED = 65_536;
const LISTS: readonly OptionName[] = ['LIST', 'LIST_META_CONTEXT'];
const MOST_LISTED_BYTES = 2 ** 22;
/** A server has no reason to send more than this before it is asked. */
const MOST_UNREAD = 2 ** 20;

export class Handshake {
  private readonly inbox = new Inbox();
  private noZeroes = false;

  constructor(private readonly transport: Transport) {
    transport.handlers = {
      data: (chunk) => this.receive(chunk),
      lost: (error) => this.inbox.fail(error),
      drain: () => undefined,
    };
    if (transport.lost) this.inbox.fail(transport.lost);
  }

  /** What has come after the last answer. */
  rest(): Buffer {
    return this.inbox.rest();
  }

  async greet(): Promise<void> {
    const hello = await this.inbox.take(HELLO_BYTES);
    const magic = hello.readBigUInt64BE(8);
    if (hello.readBigUInt64BE(0) !== HELLO_MAGIC) throw this.broken('it does not greet as NBD does');
    if (magic === OLDSTYLE_MAGIC) throw this.tooOld('it knows only the oldstyle handshake');
    if (magic !== OPTION_MAGIC) throw this.broken('it does not greet as NBD does');
    const flags = hello.readUInt16BE(16);
    if (!(flags & HANDSHAKE.fixedNewstyle)) {
      throw this.tooOld('it does not know the fixed newstyle handshake');
    }
    this.noZeroes = (flags & HANDSHAKE.noZeroes) !== 0;
    const own = flags & (HANDSHAKE.fixedNewstyle | HANDSHAKE.noZeroes);
    this.transport.send(encodeClientFlags(own));
  }

  /** Asks for TLS; when this resolves, the stream is to be upgraded. */
  async askTls(): Promise<void> {
    this.mustAck('STARTTLS', await this.ask('STARTTLS'));
    // Whatever came in the clear would otherwise be taken for what came through TLS.
    if (this.inbox.size > 0) throw this.broken('it goes on without TLS after agreeing to it');
  }

  /** Whether the server will send structured replies. */
  async askStructured(): Promise<boolean> {
    const answer = await this.ask('STRUCTURED_REPLY');
    if (answer.type === REPLY.ACK) return true;
    this.refuseTlsRequired('STRUCTURED_REPLY', answer);
    return false;
  }

  /** Chooses meta contexts by their exact names; those that the server lacks are left out. */
  async setContexts(exportName: string, names: readonly string[]): Promise<Map<number, string>> {
    const chosen = new Map<number, string>();
    const last = await this.ask('SET_META_CONTEXT', encodeMetaQuery(exportName, names), (answer) => {
      const { id, name } = this.decoded(answer, REPLY.META_CONTEXT, decodeMetaContext, 'META_CONTEXT');
      if (!names.includes(name)) throw this.broken('it chose a context that was not asked for');
      if (chosen.has(id) || [...chosen.values()].includes(name)) {
        throw this.broken('it chose a context twice');
      }
      chosen.set(id, name);
    });
    if (last.type === REPLY.ACK) return chosen;
    this.refuseTlsRequired('SET_META_CONTEXT', last);
    return new Map();
  }

  /** The meta contexts that an export has, of those that match the queries; all without queries. */
  async listContexts(exportName: string, queries: readonly string[]): Promise<string[]> {
    const found: string[] = [];
    const last = await this.ask('LIST_META_CONTEXT', encodeMetaQuery(exportName, queries), (answer) => {
      found.push(this.decoded(answer, REPLY.META_CONTEXT, decodeMetaContext, 'META_CONTEXT').name);
    });
    this.mustAck('LIST_META_CONTEXT', last);
    return found;
  }

  async listExports(): Promise<{ name: string; description: string }[]> {
    const found: { name: string; description: string }[] = [];
    const last = await this.ask('LIST', Buffer.alloc(0), (answer) => {
      found.push(this.decoded(answer, REPLY.SERVER, decodeServer, 'SERVER'));
    });
    this.mustAck('LIST', last);
    return found;
  }

  /** Takes the export, and ends the handshake. */
  async go(exportName: string): Promise<Omit<Negotiated, 'structured' | 'contexts'>> {
    const seen = new ExportInfo(exportName);
    const wanted = encodeGo(exportName, [INFO.NAME, INFO.DESCRIPTION, INFO.BLOCK_SIZE]);
    const last = await this.ask('GO', wanted, (answer) => {
      if (answer.type !== REPLY.INFO || !seen.add(answer.data)) throw this.broken('INFO is malformed');
    });
    if (last.type !== REPLY.ACK && replyErrorName(last.type) === 'UNSUP') {
      return this.exportByName(exportName);
    }
    this.mustAck('GO', last);
    if (!seen.export) throw this.broken('it does not tell the size of the export');
    return this.facts(seen, seen.export);
  }

  /** Leaves politely. */
  abort(): void {
    this.transport.send(encodeOption(OPTION.ABORT));
  }

  /** EXPORT_NAME, for servers without GO: the answer is bare, and a refusal is a closed connection. */
  private async exportByName(exportName: string) {
    this.transport.send(encodeOption(OPTION.EXPORT_NAME, Buffer.from(exportName)));
    const head = await this.inbox.take(10);
    if (!this.noZeroes) await this.inbox.take(124);
    const answer = { size: head.readBigUInt64BE(0), flags: head.readUInt16BE(8) };
    return this.facts(new ExportInfo(exportName), answer);
  }

  private facts(seen: ExportInfo, { size, flags }: { size: bigint; flags: number }) {
    if (size > BigInt(Number.MAX_SAFE_INTEGER)) throw nbdErrors.tooLarge(this.transport.path, size);
    const { name: exportName, description, blockSize } = seen;
    return { size: Number(size), flags: decodeExportFlags(flags), blockSize, exportName, description };
  }

  private receive(chunk: Buffer): void {
    this.inbox.add(chunk);
    if (this.inbox.size > MOST_UNREAD) this.transport.fail(this.broken('it sends without being asked'));
  }

  /** Sends an option; `each` gets the answers before the last one, an ACK or an error. */
  private async ask(
    name: OptionName,
    data?: Buffer,
    each: (answer: Answer) => void = () => {
      throw this.broken(`it gives ${name} an answer of another option`);
    },
  ): Promise<Answer> {
    this.transport.send(encodeOption(OPTION[name], data));
    const most = LISTS.includes(name) ? MOST_LISTED : MOST_REPLIES;
    let bytes = 0;
    for (let count = 0; count < most; count++) {
      const answer = await this.answer(name);
      if (answer.type === REPLY.ACK || answer.type >= REPLY_ERROR) return answer;
      bytes += answer.data.length;
      if (bytes > MOST_LISTED_BYTES) break;
      each(answer);
    }
    throw this.broken(`its answers to ${name} don't end`);
  }

  private async answer(name: OptionName): Promise<Answer> {
    const head = decodeOptionReplyHead(await this.inbox.take(OPTION_REPLY_BYTES));
    if (!head) throw this.broken('the magic number of an answer is wrong');
    if (head.option !== OPTION[name]) throw this.broken(`it answers another option than ${name}`);
    if (head.length > MOST_REPLY) throw this.broken(`an answer to ${name} is too long`);
    return { type: head.type, data: await this.inbox.take(head.length) };
  }

  private decoded<T>(
    answer: Answer,
    type: number,
    decode: (data: Buffer) => T | null,
    what: string,
  ): T {
    const value = answer.type === type ? decode(answer.data) : null;
    if (value === null) throw this.broken(`${what} is malformed`);
    return value;
  }

  private mustAck(name: OptionName, { type, data }: Answer): void {
    if (type === REPLY.ACK) return;
    const message = data.toString('utf8', 0, MOST_STRING);
    throw nbdErrors.refused(this.transport.path, name, replyErrorName(type), message);
  }

  private refuseTlsRequired(name: OptionName, answer: Answer): void {
    if (replyErrorName(answer.type) === 'TLS_REQD') this.mustAck(name, answer);
  }

  private broken(what: string) {
    return nbdErrors.protocol(this.transport.path, what);
  }

  private tooOld(what: string) {
    return nbdErrors.tooOld(this.transport.path, what);
  }
}

/** What the INFO answers to GO say. */
class ExportInfo {
  export: { size: bigint; flags: number } | undefined;
  blockSize: BlockSize = DEFAULT_BLOCK_SIZE;
  description: string | null = null;

  constructor(public name: string) {}

  /** False where the answer is malformed. Kinds that are not known are for others. */
  add(data: Buffer): boolean {
    if (data.length < 2) return false;
    switch (data.readUInt16BE(0)) {
      case INFO.EXPORT:
        this.export = decodeInfoExport(data) ?? undefined;
        return this.export !== undefined;
      case INFO.BLOCK_SIZE:
        return this.addBlockSize(decodeInfoBlockSize(data));
      case INFO.NAME:
        this.name = data.toString('utf8', 2);
        return true;
      case INFO.DESCRIPTION:
        this.description = data.toString('utf8', 2);
        return true;
      default:
        return true;
    }
  }

  private addBlockSize(blockSize: BlockSize | null): boolean {
    if (blockSize) this.blockSize = blockSize;
    return blockSize !== null;
  }
}
