import { DIRECT, READ_ONLY, READ_WRITE, type Descriptor } from './descriptor.js';
import { errors, ThickenError } from './errors.js';
import {
  factsOf,
  fileInUse,
  probeConflicts,
  takeImageLocks,
  workUndisturbed,
} from './exclusive.js';
import { native, SYNC_FILE, type OpenGate, type Work } from './native.js';
import { systemClock } from './throttle.js';
import { usersOfFile } from './users.js';

/** What a write is done with. */
export interface Writers {
  bufferedFd: number;
  /** -1 where direct I/O does not work. */
  directFd: number;
  gate: OpenGate;
}

export interface HoldOptions {
  /** Whether direct I/O is wanted. */
  direct: boolean;
  /** The caller's word that nobody else writes, where that can't be found out. */
  trusted: boolean;
  /** Whether what is changed is more than zeros: tables, for one. */
  guarded?: boolean;
}

/** A QEMU that fails to get its locks has the file open for a moment. */
const PATIENCE_MS = 800;
const PROBE_MS = 25;
const ATTEMPTS = 50;
const NEVER = new AbortController().signal;

/**
 * A file that nobody else writes to, proven, for as long as this is held:
 * 1. a read lease would be refused if anybody had it open for writing (a loop device, for instance,
 *    that heeds no lock); 2. QEMU's locks; 3. a gate that stops the work as soon as somebody opens
 *    the file, and then all that again.
 * The lease does not see past writing descriptors of our own, so these are opened after it, and
 * closed before the next one; the gate opens them, so that it sees whether anybody slips in between.
 */
export class FileHold implements AsyncDisposable {
  private buffered: Descriptor | undefined;
  private direct: Descriptor | undefined;
  private directWorks: boolean;
  private proof: Promise<void> = Promise.resolve();
  private renewing = false;
  /** How often it has been proven: what is known of the file's content is as old as that. */
  proofs = 0;
  /** False only where the caller vouches for it: then opens are not counted. */
  private watched = true;

  private constructor(
    private readonly image: Descriptor,
    private readonly lock: Descriptor,
    private readonly gate: OpenGate,
    private readonly options: HoldOptions,
  ) {
    this.directWorks = options.direct;
  }

  /** Throws IN_USE, EACCES, EPERM or EROFS. */
  static async take(image: Descriptor, options: HoldOptions): Promise<FileHold> {
    await image.checkWritable();
    const lock = await image.reopen(READ_ONLY);
    const hold = new FileHold(image, lock, new (native().OpenGate)(), options);
    try {
      await hold.refuseWriters(0);
      if ((await takeImageLocks(lock)).length > 0) throw await hold.inUse();
      await hold.watch();
      await hold.prove(0);
      return hold;
    } catch (error) {
      await hold[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Work with the writing descriptors, redone in part where somebody opened the file meanwhile. */
  run(
    ranges: Float64Array,
    work: (ranges: Float64Array, writers: Writers) => Promise<Work>,
  ): Promise<Work> {
    return workUndisturbed(
      this.lock.path,
      ranges,
      (rest) => this.use((writers) => work(rest, writers)),
      () => this.renew(),
    );
  }

  async sync(): Promise<void> {
    await this.proof;
    await this.buffered!.use((fd) => native().syncFile(fd, SYNC_FILE));
  }

  private inUse(): Promise<ThickenError> {
    return fileInUse(this.lock, this.options.guarded);
  }

  /** Work with the writing descriptors, when the proof stands. */
  async use<T>(work: (writers: Writers) => Promise<T>): Promise<T> {
    await this.proof;
    return this.useWriters(work);
  }

  private useWriters<T>(work: (writers: Writers) => Promise<T>): Promise<T> {
    const { gate } = this;
    return this.buffered!.use((bufferedFd) => {
      if (!this.direct) return work({ bufferedFd, directFd: -1, gate });
      return this.direct.use((directFd) => work({ bufferedFd, directFd, gate }));
    });
  }

  private async watch(): Promise<void> {
    try {
      await this.lock.useNow((fd) => this.gate.watch(fd));
    } catch (error) {
      if (!this.options.trusted) throw this.cannotTell(error);
      this.watched = false;
    }
  }

  /** Proves it again. One renewal serves all the work that was stopped. */
  renew(): Promise<void> {
    if (!this.renewing) {
      this.renewing = true;
      this.proof = this.prove(PATIENCE_MS).finally(() => (this.renewing = false));
      this.proof.catch(() => undefined);
    }
    return this.proof;
  }

  private async prove(patience: number): Promise<void> {
    this.proofs++;
    const harmless = new Set<string>();
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      await this.closeWriters();
      this.gate.reset();
      await this.refuseWriters(patience);
      await this.openWriters();
      if (!this.watched) return;
      if (this.gate.settle() && (await this.nobodySlippedIn(harmless))) return;
    }
    throw errors.inUse(this.image.path, 'somebody who opens it over and over', 'let it be');
  }

  /**
   * Looks for those whom the gate may have missed, as far as they can be seen. Whoever is found is
   * harmless if the lease of the next attempt finds no writer: a loop device that only reads.
   */
  private async nobodySlippedIn(harmless: Set<string>): Promise<boolean> {
    if (this.gate.knowsOpeners()) return true;
    if ((await probeConflicts(this.lock)).length > 0) return false;
    const { by } = await usersOfFile(await factsOf(this.lock), { writersOnly: true });
    const news = by.filter((user) => !harmless.has(user));
    for (const user of news) harmless.add(user);
    return news.length === 0;
  }

  private async refuseWriters(patience: number): Promise<void> {
    const until = systemClock.now() + patience;
    while (await this.hasWriter()) {
      if (systemClock.now() >= until) throw await this.inUse();
      await systemClock.sleep(PROBE_MS, NEVER);
    }
  }

  private async hasWriter(): Promise<boolean> {
    try {
      return await this.lock.use((fd) => native().probeWriter(fd));
    } catch (error) {
      if (this.options.trusted) return false;
      throw this.cannotTell(error);
    }
  }

  private cannotTell(error: unknown): unknown {
    if (!(error instanceof ThickenError) || error.errno === undefined) return error;
    return errors.cannotTellUsers(this.image.path, `${error.syscall} answers ${error.code}`);
  }

  /** After a direct open that was refused, the gate may be of two minds: the next attempt has none. */
  private async openWriters(): Promise<void> {
    this.buffered = await this.image.reopen(READ_WRITE, this.gate);
    if (!this.directWorks) return;
    this.direct = await this.image.reopen(READ_WRITE | DIRECT, this.gate).catch((error: unknown) => {
      if (!(error instanceof ThickenError) || error.code !== 'EINVAL') throw error;
      this.directWorks = false;
      return undefined;
    });
  }

  private async closeWriters(): Promise<void> {
    await Promise.all([this.buffered?.close(), this.direct?.close()]);
    this.buffered = this.direct = undefined;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.proof.catch(() => undefined);
    await this.closeWriters();
    // Whoever was held up goes on at once. What the kernel takes to tidy up, 20 ms now and then, only the image's
    // own close waits for.
    const closed = this.gate.close();
    this.image.use(() => closed).catch(() => undefined);
    await this.lock.close();
  }
}
