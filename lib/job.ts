/** A plan being carried out. */
import { EventEmitter } from 'node:events';
import { Controls } from './controls.js';
import { errors, ThickenError, toThickenError, withDetails } from './errors.js';
import { doubtOf, planFor, planRequestOf, type JobImage, type Scope } from './job-image.js';
import type { Work } from './native.js';
import { RateMeter } from './pace.js';
import { runPass, type PassControl } from './pass.js';
import { routeFor, type Plan, type PlanPass, type PlanRequest } from './plan.js';
import { bytesNeeded, ENDLESS_ROOM, keepFreeBytes, spaceOf, SpaceWatch } from './space.js';
import type {
  AllocationDone,
  AllocationRequest,
  AllocationResult,
  Progress,
  RouteName,
} from './types.js';

const PROGRESS_MS = 100;
/** More would be a race with a guest that gives storage back as fast as it comes. */
const MORE_ROUNDS = 2;

/**
 * Allocates what a request asks for. Emits `progress` ({@link Progress}) at most ten times a
 * second, and once at the end.
 */
export class Job extends EventEmitter<{ progress: [Progress] }> {
  /**
   * Rejects with a ThickenError: CANCELLED, KEEP_FREE, ENOSPC, EDQUOT, IN_USE, RANGE, USAGE,
   * FORMAT_REQUIRED, UNSUPPORTED, CHANGED, NOT_VERIFIED, or the errno's name of a failed call. Once
   * the run had begun, the error's `done` says how far it came. A result that nobody awaits does
   * not end the process.
   */
  readonly result: Promise<AllocationResult>;

  private readonly controls: Controls;
  private readonly rate = new RateMeter();
  private readonly began = performance.now();
  private emitted = -Infinity;
  private route: RouteName = 'fallocate';
  private position = 0;
  private total = 0;
  private allocated = 0;
  private skipped = 0;

  constructor(
    private readonly image: JobImage,
    private readonly request: AllocationRequest,
    signal?: AbortSignal,
  ) {
    super();
    this.controls = new Controls(image.path);
    if (signal?.aborted) this.cancel();
    const onAbort = () => this.cancel();
    signal?.addEventListener('abort', onAbort, { once: true });
    this.result = this.run().finally(() => signal?.removeEventListener('abort', onAbort));
    this.result.catch(() => undefined);
  }

  /** Stops before the next chunk; what is in flight is completed. */
  pause(): void {
    if (this.controls.pause()) this.emitProgress(true);
  }

  resume(): void {
    this.controls.resume();
    this.emitProgress(true);
  }

  get paused(): boolean {
    return this.controls.paused;
  }

  /** Most bytes a second from now on; Infinity for no limit. Throws RANGE unless above 0. */
  setSpeed(bytesPerSecond: number): void {
    this.controls.setSpeed(bytesPerSecond);
  }

  /** Most requests a second from now on; Infinity for no limit. Throws RANGE unless above 0. */
  setIops(requestsPerSecond: number): void {
    this.controls.setIops(requestsPerSecond);
  }

  /** Ends the run after what is in flight; `result` then rejects with CANCELLED. */
  cancel(): void {
    this.controls.cancel();
  }

  /** Where the run is, now. */
  progress(): Progress {
    const rate = this.rate.note(performance.now(), this.position);
    const left = this.total - this.position;
    return {
      position: this.position,
      total: this.total,
      route: this.route,
      rate,
      secondsLeft: rate > 0 ? left / rate : null,
      paused: this.paused,
    };
  }

  private async run(): Promise<AllocationResult> {
    // Lets the caller attach listeners before anything happens.
    await Promise.resolve();
    const { image, controls } = this;
    const { speed, iops } = this.request;
    if (speed !== undefined) controls.setSpeed(speed);
    if (iops !== undefined) controls.setIops(iops);
    keepFreeBytes(this.request.keepFree);
    await image.check(this.request, controls.cancelFlag);
    const { scope, ...request } = planRequestOf(image, this.request);
    const plan = await this.firstPlan(scope, request);
    try {
      const carriedOut = await this.carryOut(plan, request);
      return await this.finish(scope, request, plan, carriedOut);
    } catch (error) {
      const failure = withDetails(toThickenError(error), { done: this.done(scope, plan) });
      throw await this.withSpace(failure);
    }
  }

  /** A refusal comes before anything has begun; whoever cancels is told what was done: nothing. */
  private async firstPlan(scope: Scope, request: PlanRequest): Promise<Plan> {
    try {
      const plan = await this.scan(request);
      await this.image.refuse?.(plan);
      return plan;
    } catch (error) {
      if (!(error instanceof ThickenError) || error.code !== 'CANCELLED') throw error;
      throw withDetails(error, { done: this.done(scope, null) });
    }
  }

  /** Says how much is missing, where a file system or a quota turned out to be full on the way. */
  private async withSpace(failure: ThickenError): Promise<ThickenError> {
    const full = failure.code === 'ENOSPC' || failure.code === 'EDQUOT';
    if (!full || failure.needed !== undefined) return failure;
    const { storage } = this.image;
    const available = storage ? (await spaceOf(storage)).available : undefined;
    return withDetails(failure, { needed: this.total - this.position, available });
  }

  private async scan(request: PlanRequest): Promise<Plan> {
    const plan = await planFor(this.image, request, this.controls.cancelFlag, false);
    this.controls.throwIfCancelled();
    return plan;
  }

  /** Returns the plan that was carried out in the end. */
  private async carryOut(plan: Plan, request: PlanRequest): Promise<Plan> {
    if (plan.passes.length === 0) return plan;
    const [keepFree] = await Promise.all([this.checkSpace(plan), this.image.liveness.start()]);
    this.total = this.position + bytesOf(plan);
    try {
      await this.runPasses(plan, request, keepFree);
      return plan;
    } catch (error) {
      if (!this.turnAbilityOff(error)) throw error;
      return this.carryOut(await this.scan(request), request);
    }
  }

  /** Whether the error shows that the file system lacks what the plan had hoped for. */
  private turnAbilityOff(error: unknown): boolean {
    const { abilities } = this.image.facts;
    const lacking = error instanceof ThickenError && error.code === 'EOPNOTSUPP';
    if (!lacking || (this.route !== 'fallocate' && this.route !== 'unshare')) return false;
    if (this.request.route === this.route || !abilities[this.route]) return false;
    abilities[this.route] = false;
    return true;
  }

  private async runPasses(plan: Plan, request: PlanRequest, keepFree: number): Promise<void> {
    for (const pass of plan.passes) {
      this.route = pass.route;
      // What concerns the image as a whole is done in no chunk.
      const end = Math.min(this.total, this.position + pass.bytes);
      await this.runOne(pass, request, keepFree);
      this.controls.throwIfCancelled();
      this.position = Math.max(this.position, end);
    }
    this.emitProgress(true);
  }

  private async runOne(pass: PlanPass, request: PlanRequest, keepFree: number): Promise<void> {
    const { image } = this;
    const { exclusive = false } = this.request;
    const { level, range } = request;
    const asked = { level, range, exclusive, keepsFree: keepFree > 0, keepFree: this.request.keepFree };
    const other = await image.passOf?.(pass.route, asked);
    await runPass(
      {
        path: image.path,
        route: other?.route ?? image.route(pass.route, asked),
        source: image.source,
        granularity: image.granularity,
        range: pass.range,
        takes: (state: number) => routeFor(state, image.facts, request) === pass.route,
        known: pass.ranges,
        ...other,
      },
      this.passControl(keepFree),
    );
  }

  private passControl(keepFree: number): PassControl {
    const { controls } = this;
    const { storage, liveness } = this.image;
    const watch = keepFree > 0 && storage ? new SpaceWatch(storage, keepFree) : null;
    return {
      signal: controls.signal,
      cancel: controls.cancelFlag,
      throttle: controls.throttle,
      limits: () => controls.limits(),
      unpaused: () => controls.unpaused(),
      steer: (steered) => controls.steer(steered),
      room: (wanted) => watch?.room(wanted, this.allocated) ?? Promise.resolve(ENDLESS_ROOM),
      live: () => liveness.live(),
      completed: (work) => this.completed(work),
    };
  }

  /** Throws ENOSPC or EDQUOT, before anything is changed. Returns the bytes to keep free. */
  private async checkSpace(plan: Plan): Promise<number> {
    const { storage } = this.image;
    if (!storage) return 0;
    const space = await spaceOf(storage);
    const keepFree = keepFreeBytes(this.request.keepFree, space);
    const taken = (await this.image.takes?.(plan, this.request)) ?? plan.survey.needed;
    const needed = bytesNeeded({ needed: taken, pieces: plan.survey.pieces }, storage.filesystem);
    if (needed === 0) return 0;
    if (needed > space.available) {
      throw errors.noSpace(this.image.path, needed, space.available, space.quota);
    }
    return keepFree;
  }

  private completed(work: Work): void {
    this.allocated += work.allocated;
    this.skipped += work.skipped;
    this.position = Math.min(this.total, this.position + work.allocated + work.skipped);
    this.emitProgress(false);
  }

  private emitProgress(always: boolean): void {
    const now = performance.now();
    if (!always && now - this.emitted < PROGRESS_MS) return;
    this.emitted = now;
    this.emit('progress', this.progress());
  }

  /** Scans, and fills what lost its storage while the run went on: a guest's discard, for one. */
  private async settle(request: PlanRequest): Promise<Plan> {
    let plan = await this.look(request);
    const { exact } = this.image;
    for (let round = 0; round < MORE_ROUNDS && plan.passes.length > 0; round++) {
      if (!exact || doubtOf(this.image, request.level) !== null) break;
      await this.carryOut(plan, request);
      plan = await this.look(request);
    }
    return plan;
  }

  /** A scan by what the image is now: a snapshot taken meanwhile changes what must be reserved. */
  private async look(request: PlanRequest): Promise<Plan> {
    await this.image.check(this.request, this.controls.cancelFlag);
    return this.scan(request);
  }

  private async finish(
    scope: Scope,
    request: PlanRequest,
    before: Plan,
    carriedOut: Plan,
  ): Promise<AllocationResult> {
    const { image } = this;
    const changed = carriedOut.passes.length > 0;
    if (!changed) await image.check(this.request);
    const { survey: after, passes: left } = changed ? await this.settle(request) : before;
    // Only now: that a server's map does not show what was done is seen in the map.
    const known = image.exact;
    const lacking = after.missing + after.unreserved;
    const verified = known ? lacking === 0 : null;
    const doubt = doubtOf(image, request.level);
    const guarantee = verified === true && doubt === null && request.level !== 'metadata';
    // What is shared where nothing can unshare it is there, and only can't be promised.
    const promised = doubt === null && (left.length > 0 || lacking > after.shared);
    if (verified === false && promised) {
      throw errors.notVerified(image.path, lacking, left.length === 0);
    }
    return {
      target: image.path,
      format: image.format,
      preallocation: request.level,
      ...scope,
      // As a plan has it: many callers never look.
      get plan() {
        return carriedOut.steps;
      },
      before: { allocated: known ? before.survey.met : null },
      after: { allocated: known ? after.met : null },
      allocated: known ? Math.max(0, after.met - before.survey.met) : this.allocated,
      skipped: before.survey.met + (known ? 0 : this.skipped),
      seconds: this.seconds(),
      verified,
      guarantee,
      warnings: [...this.unwatched(), ...warningsOf(image, doubt, verified, after.shared)],
    };
  }

  private unwatched(): string[] {
    if (this.request.keepFree === undefined || this.image.storage) return [];
    return ['what is free can’t be seen from here: nothing was held back to keep free space'];
  }

  /** `plan`: null before there was one. */
  private done(scope: Scope, plan: Plan | null): AllocationDone {
    const met = plan?.survey.met ?? 0;
    return {
      ...scope,
      before: { allocated: plan && this.image.exact ? met : null },
      allocated: this.allocated,
      skipped: met + this.skipped,
      seconds: this.seconds(),
    };
  }

  private seconds(): number {
    return Math.round(performance.now() - this.began) / 1000;
  }
}

function bytesOf(plan: Plan): number {
  return plan.passes.reduce((sum, pass) => sum + pass.bytes, 0);
}

function warningsOf(
  image: JobImage,
  doubt: string | null,
  verified: boolean | null,
  shared: number,
): string[] {
  const warnings = [...image.warnings];
  if (doubt !== null) warnings.push(`no guarantee: ${doubt}`);
  if (verified === false && shared > 0) {
    warnings.push(`${shared} bytes stay shared with another file: this file system can't unshare them`);
  }
  return warnings;
}
