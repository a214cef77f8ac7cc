import { createConnection, type Socket } from 'node:net';

// A dump of 1 GiB without two equal neighbours is 3 MiB.
const LONGEST_LINE = 64 * 1024 * 1024;

interface Pending {
  resolve(line: string): void;
  reject(error: Error): void;
}

/** The host's end of a guest's serial port: one line out, one line back, in turn. */
export class GuestChannel {
  readonly #socket: Socket;
  readonly #pending: Pending[] = [];
  #text: string[] = [];
  #length = 0;
  #over: Error | undefined;

  private constructor(socket: Socket) {
    this.#socket = socket;
    socket.setEncoding('utf8').on('data', (chunk: string) => this.#take(chunk));
    // It closes when QEMU ends, and whoever started that one says so; see fail().
    socket.on('error', () => undefined);
  }

  static connect(path: string): Promise<GuestChannel> {
    return new Promise((resolve, reject) => {
      const socket = createConnection(path);
      socket.once('connect', () => resolve(new GuestChannel(socket)));
      socket.once('error', reject);
    });
  }

  /** The next line that nobody waits for yet. */
  line(): Promise<string> {
    return new Promise((resolve, reject) => {
      if (this.#over) reject(this.#over);
      else this.#pending.push({ resolve, reject });
    });
  }

  send(line: string): Promise<string> {
    if (line.includes('\n')) throw new Error(`more than one line: ${JSON.stringify(line)}`);
    const answer = this.line();
    this.#socket.write(`${line}\n`);
    return answer;
  }

  /** Whoever waits gets this error, and everybody who asks from now on. */
  fail(error: Error): void {
    this.#over ??= error;
    this.#socket.destroy();
    for (const { reject } of this.#pending.splice(0)) reject(this.#over);
  }

  #take(chunk: string): void {
    const [first = '', ...others] = chunk.split('\n');
    this.#add(first);
    for (const start of others) {
      const line = this.#text.join('');
      this.#text = [];
      this.#length = 0;
      this.#add(start);
      this.#pending.shift()?.resolve(line);
    }
  }

  #add(text: string): void {
    this.#text.push(text);
    this.#length += text.length;
    if (this.#length > LONGEST_LINE) this.fail(new Error('an endless line from the guest'));
  }
}
