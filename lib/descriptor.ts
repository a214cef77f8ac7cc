import { close, constants, fstat, open, type Stats } from 'node:fs';
import { access } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { promisify } from 'node:util';
import { errors, isRawSystemError, systemError, ThickenError } from './errors.js';
import type { OpenGate } from './native.js';

const openFile = promisify(open);
const closeFile = promisify(close);
const fstatFile = promisify(fstat);

/** How long an opening waits for a lease: another thicken's probe lasts for microseconds. */
const LEASE_TRIES = 10;
const LEASE_WAIT_MS = 10;

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
    /** Whose it is to close, where it is not Node's. */
    private readonly gate?: OpenGate,
  ) {
    Descriptor.numbers.add(fd);
  }

  /**
   * Throws a ThickenError with the errno's name as code. O_NONBLOCK: opening a FIFO or a tape must
   * not wait for somebody at the other end; it means nothing to files and disks.
   */
  static async open(path: string, flags: number): Promise<Descriptor> {
    try {
      return new Descriptor(path, await openPatiently(path, flags | constants.O_NONBLOCK));
    } catch (error) {
      throw translate(error, path);
    }
  }

  /** The same, of what `facts` were taken of. Throws CHANGED where the name leads elsewhere by now. */
  static async openSame(path: string, flags: number, facts: Stats): Promise<Descriptor> {
    const descriptor = await Descriptor.open(path, flags);
    try {
      if (isSame(facts, await descriptor.use((fd) => fstatFile(fd)))) return descriptor;
      throw errors.changed(path, 'the name led to another file when it was opened');
    } catch (error) {
      await descriptor.close();
      throw error;
    }
  }

  /**
   * The same file or device opened once more, with locks and position of its own; whatever `path`
   * names by now. A foreign lease is waited for, as long as the kernel lets it stand. With a gate
   * that watches the file, as an open that this one knows of; it is to outlive the descriptor.
   */
  async reopen(flags: number, gate?: OpenGate): Promise<Descriptor> {
    return this.use(async (fd) => {
      const opened = gate ? gate.open(fd, flags) : openFile(`/proc/self/fd/${fd}`, flags);
      return new Descriptor(this.path, await opened, gate);
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

  /** The same for a call that does not wait. */
  useNow<T>(work: (fd: number) => T): Promise<T> {
    return this.use((fd) => Promise.resolve(fd).then(work));
  }

  /** Waits for work in flight. Safe to call again. */
  close(): Promise<void> {
    this.closing ??= this.closeWhenIdle();
    return this.closing;
  }

  private async closeWhenIdle(): Promise<void> {
    if (this.inFlight > 0) await new Promise<void>((resolve) => (this.idle = resolve));
    Descriptor.numbers.delete(this.fd);
    await (this.gate ? this.gate.closeOpened(this.fd) : closeFile(this.fd));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** With O_NONBLOCK, EAGAIN says that a lease is being taken from its holder (fcntl(2)). */
async function openPatiently(path: string, flags: number): Promise<number> {
  for (let tries = 1; ; tries++) {
    try {
      return await openFile(path, flags);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'EAGAIN' || tries > LEASE_TRIES) throw error;
      await sleep(LEASE_WAIT_MS);
    }
  }
}

/** A device's nodes are many, its number is one; a file's number is its inode's. */
function isSame(a: Stats, b: Stats): boolean {
  const sameKind = (a.mode & constants.S_IFMT) === (b.mode & constants.S_IFMT);
  return sameKind && (a.isBlockDevice() ? a.rdev === b.rdev : a.dev === b.dev && a.ino === b.ino);
}

function translate(error: unknown, path: string): unknown {
  if (error instanceof ThickenError || !isRawSystemError(error)) return error;
  return systemError(error, path);
}
