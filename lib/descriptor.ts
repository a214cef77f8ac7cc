import { close, constants, open } from 'node:fs';
import { access } from 'node:fs/promises';
import { promisify } from 'node:util';
import { errors, isRawSystemError, systemError, ThickenError } from './errors.js';

const openFile = promisify(open);
const closeFile = promisify(close);

export const READ_ONLY = constants.O_RDONLY;
export const READ_WRITE = constants.O_RDWR;
export const DIRECT = constants.O_DIRECT;
export const EXCLUSIVE = constants.O_EXCL;

/**
 * An open file that closes only when no work on it is in flight: a descriptor number given to the
 * native threads must not be reused by another open meanwhile.
 */
export class Descriptor implements AsyncDisposable {
  private static readonly numbers = new Set<number>();

  /** The numbers of all that this environment has open: not foreign where users are looked for. */
  static ownNumbers(): ReadonlySet<number> {
    return Descriptor.numbers;
  }

  private inFlight = 0;
  private closing: Promise<void> | undefined;
  private idle: (() => void) | undefined;

  private constructor(
    readonly path: string,
    private readonly fd: number,
  ) {
    Descriptor.numbers.add(fd);
  }

  /**
   * Throws a ThickenError with the errno's name as code. O_NONBLOCK: opening a FIFO or a tape must
   * not wait for somebody at the other end; it means nothing to files and disks.
   */
  static async open(path: string, flags: number): Promise<Descriptor> {
    try {
      return new Descriptor(path, await openFile(path, flags | constants.O_NONBLOCK));
    } catch (error) {
      throw translate(error, path);
    }
  }

  /**
   * The same file or device opened once more, with locks and position of its own; whatever `path`
   * names by now.
   */
  async reopen(flags: number): Promise<Descriptor> {
    return this.use(async (fd) => {
      const number = await openFile(`/proc/self/fd/${fd}`, flags | constants.O_NONBLOCK);
      return new Descriptor(this.path, number);
    });
  }

  /** Throws EACCES, EPERM or EROFS unless the file may be opened for writing; opens nothing. */
  checkWritable(): Promise<void> {
    return this.use((fd) => access(`/proc/self/fd/${fd}`, constants.W_OK));
  }

  /** Runs `work` with the descriptor; its system errors become ThickenErrors that name the file. */
  async use<T>(work: (fd: number) => Promise<T>): Promise<T> {
    if (this.closing) throw errors.closed(this.path);
    this.inFlight++;
    try {
      return await work(this.fd);
    } catch (error) {
      throw translate(error, this.path);
    } finally {
      this.inFlight--;
      if (this.inFlight === 0) this.idle?.();
    }
  }

  /** Waits for work in flight. Safe to call again. */
  close(): Promise<void> {
    this.closing ??= this.closeWhenIdle();
    return this.closing;
  }

  private async closeWhenIdle(): Promise<void> {
    if (this.inFlight > 0) await new Promise<void>((resolve) => (this.idle = resolve));
    Descriptor.numbers.delete(this.fd);
    await closeFile(this.fd);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

function translate(error: unknown, path: string): unknown {
  if (error instanceof ThickenError || !isRawSystemError(error)) return error;
  return systemError(error, path);
}
