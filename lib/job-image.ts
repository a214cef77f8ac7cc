/** What a job and a plan need to know of an image. */
import type { ExtentSource } from './extent-source.js';
import type { Liveness } from './liveness.js';
import type { CancelFlag } from './native.js';
import type { PassRequest } from './pass.js';
import { Planner, type Plan, type PlanFacts, type PlanRequest } from './plan.js';
import { resolveRange, widen } from './range.js';
import type { Route, RouteRequest } from './routes/route.js';
import type { Storage } from './space.js';
import type { AllocationRequest, ByteRange, Preallocation, RouteName } from './types.js';

/** The image as a job needs it. */
export interface JobImage {
  path: string;
  format: string;
  /** Bytes. */
  size: number;
  granularity: number;
  source: ExtentSource;
  facts: PlanFacts;
  /** Where the space comes from that is allocated; null where that can't be seen. */
  storage: Storage | null;
  liveness: Liveness;
  /** Whether the extents tell reserved from missing, so that a result can be verified. */
  exact: boolean;
  /** What can't be promised of this image. */
  noGuarantee: string | null;
  warnings: string[];
  /** Throws where the image can't be acted on, or not as the request asks; and CANCELLED. */
  check(request: AllocationRequest, cancel?: CancelFlag): Promise<void>;
  /** Throws where a plan can't be carried out as a whole. Nothing has been changed then. */
  refuse?(plan: Plan): Promise<void>;
  /**
   * Bytes of new blocks of `storage`; null: what the plan's survey says. Throws ENOSPC, EDQUOT or KEEP_FREE
   * where another file system that the plan draws on has too little.
   */
  takes?(plan: Plan, request: AllocationRequest): Promise<number | null>;
  route(name: RouteName, request: RouteRequest): Route;
  /** What is different of a pass, where it does not go over the image's own extents. */
  passOf?(
    name: RouteName,
    request: RouteRequest,
  ): Partial<PassRequest> | null | Promise<Partial<PassRequest> | null>;
}

export interface Scope {
  requested: ByteRange;
  effective: ByteRange;
}

/** The range of a request. Throws RANGE. */
export function scopeOf(image: JobImage, request: { offset?: number; length?: number }): Scope {
  const { size, granularity } = image;
  const requested = resolveRange(request, size, image.path);
  return { requested, effective: widen(requested, granularity, size) };
}

/** Scans the range, and plans what to do about it; `reasons`: lists why what is missing is missing. */
export async function planFor(
  image: JobImage,
  request: PlanRequest,
  cancel?: CancelFlag,
  reasons = true,
): Promise<Plan> {
  const planner = new Planner(image.facts, request, reasons);
  for await (const page of image.source.pages(request.range, cancel)) planner.add(page);
  return planner.finish();
}

/** A request with what it leaves open filled in. Throws RANGE. */
export function planRequestOf(
  image: JobImage,
  request: AllocationRequest,
): PlanRequest & { scope: Scope } {
  const scope = scopeOf(image, request);
  const { preallocation: level = 'falloc', route, dropBacking = false } = request;
  return { scope, range: scope.effective, level, route, dropBacking };
}

/** Why storage is not guaranteed; level `metadata` promises none. */
export function doubtOf(image: JobImage, level: Preallocation): string | null {
  return level === 'metadata' ? null : image.noGuarantee;
}
