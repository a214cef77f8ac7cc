/** The native allocator at work on an image that is held alone. */
import { errors, ThickenError } from '../errors.js';
import {
  native,
  NO_WORK,
  type CancelFlag,
  type Qcow2Needs,
  type Qcow2Progress,
  type Qcow2Writers,
  type Work,
} from '../native.js';
import { endOf } from '../range.js';
import { withPartial } from '../outcomes.js';
import type { AllocationRequest, ByteRange } from '../types.js';
import { throwIfRefused } from './errors.js';
import { Qcow2Hold } from './hold.js';
import { prepareNeeds, type NeedsRequest } from './needs.js';
import { compareSpace, keepsRoom, onOneDevice } from './room.js';
import type { Qcow2Files } from './tables.js';

export interface AllocationOptions extends NeedsRequest {
  /** The caller's word that nobody else uses the image. */
  exclusive: boolean;
  keepFree?: AllocationRequest['keepFree'];
}

/** Less is lost where opens of the image come faster than what a call is given is done. */
const LEAST_CALL = 2 ** 20;

export class Qcow2Allocation implements AsyncDisposable {
  private readonly session = new (native().Qcow2Session)();
  /** The proof of the hold that the session's knowledge is as old as. */
  private known = -1;
  /** Space is compared before the first change only: what follows goes on with what was taken. */
  private compared = false;
  private needs: Qcow2Needs | null = null;
  private beside = 0;
  /** Bytes that a call is given at most: an open ends it, and what was not mapped by then is begun anew. */
  private most = Infinity;

  private constructor(
    private readonly files: Qcow2Files,
    private readonly request: AllocationOptions,
    readonly hold: Qcow2Hold,
  ) {}

  /**
   * Takes the locks, and reads everything afresh. Throws IN_USE, ENOSPC, EDQUOT, KEEP_FREE, CANCELLED, and
   * what is refused.
   */
  static async open(
    files: Qcow2Files,
    options: AllocationOptions,
    cancel?: CancelFlag,
  ): Promise<Qcow2Allocation> {
    const hold = await Qcow2Hold.take(files, options.exclusive);
    const allocation = new Qcow2Allocation(files, options, hold);
    try {
      await allocation.prepare(cancel);
      return allocation;
    } catch (error) {
      await allocation[Symbol.asyncDispose]();
      throw error;
    }
  }

  private async prepare(cancel?: CancelFlag): Promise<void> {
    const { proofs } = this.hold;
    const { needs, refusal } = await prepareNeeds(this.session, this.files, this.request, cancel);
    if (refusal) throw refusal;
    if (!this.compared) await compareSpace(this.files, needs, this.request.keepFree);
    this.compared = true;
    this.known = proofs;
    this.needs = needs;
    this.beside = needs.tables + needs.refcounts;
  }

  /** Bytes that tables and counts still take, where the clusters of the range lie too. */
  async takesBeside(): Promise<number> {
    return (await onOneDevice(this.files)) ? this.beside : 0;
  }

  /** Whether zeros are written to some clusters when they are mapped: as much as is mapped at a time. */
  get writesZeros(): boolean {
    return (this.needs?.stale ?? 0) > 0;
  }

  /** Maps all of a range. `allocated` are the bytes of it that have been gone through. */
  async allocate({ offset, length }: ByteRange, cancel: CancelFlag): Promise<Work> {
    return this.hold.run(Float64Array.of(offset, length), (rest, writers, dataWriters) =>
      rest.length === 0
        ? Promise.resolve(NO_WORK)
        : this.allocateRest({ offset: rest[0]!, length: rest[1]! }, writers, dataWriters, cancel),
    );
  }

  private async allocateRest(
    range: ByteRange,
    writers: Qcow2Writers,
    dataWriters: Qcow2Writers | undefined,
    cancel: CancelFlag,
  ): Promise<Work> {
    if (this.known !== this.hold.proofs) await this.prepare(cancel);
    let work = NO_WORK;
    try {
      for (let at = range.offset; at < endOf(range) && !work.cancelled && !work.disturbed;) {
        const rest = Math.min(this.most, endOf(range) - at);
        const done = await native().allocateQcow2(this.session, writers, dataWriters, at, rest, cancel);
        throwIfRefused(done, this.files.file.file.path);
        if (!done.disturbed) this.beside = done.beside;
        this.most = done.disturbed ? Math.max(LEAST_CALL, Math.ceil(rest / 8)) : this.most * 2;
        if (done.next <= at && !done.cancelled && !done.disturbed) throw this.shrunk(at);
        work = added(work, done, at);
        at = done.next;
      }
    } catch (error) {
      throw after(work, error);
    }
    return work;
  }

  /** Somebody put another image in its place, whose disk ends before. */
  private shrunk(at: number): ThickenError {
    return errors.changed(this.files.file.file.path, `its virtual disk ends before byte ${at} now`);
  }

  /**
   * Frees what leaked, gives blocks to tables that lack them, reserves what later writes need, and syncs.
   * What is cancelled takes nothing more. Throws KEEP_FREE where there is no room for it.
   */
  async finish(cancel: CancelFlag): Promise<void> {
    const { file } = this.files;
    const found: { refusal: ThickenError | null } = { refusal: null };
    await this.hold.run(Float64Array.of(0, 1), async (_rest, writers, dataWriters) => {
      if (this.known !== this.hold.proofs) await this.prepare(cancel);
      found.refusal = await keepsRoom(file, this.needs?.later ?? 0, this.request.keepFree);
      const flag = found.refusal ? cancelledFlag() : cancel;
      const done = await native().finishQcow2(this.session, writers, dataWriters, flag);
      throwIfRefused(done, file.file.path);
      return { ...NO_WORK, disturbed: done.disturbed };
    });
    if (found.refusal) throw found.refusal;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.session.close();
    await this.hold[Symbol.asyncDispose]();
  }
}

function added(work: Work, { next, cancelled, disturbed }: Qcow2Progress, at: number): Work {
  return {
    allocated: work.allocated + (cancelled || disturbed ? 0 : next - at),
    skipped: 0,
    requests: work.requests + 1,
    cancelled,
    disturbed,
  };
}

/** What came before a failure still counts; the call that failed is taken to have mapped nothing. */
function after(work: Work, error: unknown): unknown {
  if (error instanceof ThickenError) return withPartial(error, work);
  // Whoever names the file in it keeps it as the cause.
  return Object.assign(error as Error, { partial: work });
}

function cancelledFlag(): CancelFlag {
  const flag = new (native().CancelFlag)();
  flag.cancel();
  return flag;
}
