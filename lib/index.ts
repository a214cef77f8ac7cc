export { open, type OpenOptions } from './open.js';
export type { SecretSource } from './secret.js';
export { Image } from './image.js';
export type { GuestTarget } from './target.js';
export { Job } from './job.js';
export { ThickenError } from './errors.js';
export { QmpClient, type ConnectOptions, type ExecuteOptions } from './qmp/client.js';
export {
  listJobs,
  steer as steerJob,
  type JobEntry,
  type JobVerb,
  type Steering,
} from './qmp/job-control.js';
export type { JobState } from './qmp/job-sample.js';
export type { QmpReceiver, QmpTransport } from './qmp/transport.js';
export {
  EXTENT_FLAGS,
  HOST_STATES,
  type Extent,
  type ExtentPage,
  type HostState,
} from './extent.js';
export type { ExtentMethod } from './native.js';
export type { Plan, Survey } from './plan.js';
export type {
  AllocationDone,
  AllocationRequest,
  AllocationResult,
  ByteRange,
  DetachedResult,
  ImageInfo,
  MapEntry,
  MissingRange,
  PlanStep,
  Preallocation,
  Progress,
  RouteName,
  Verdict,
} from './types.js';
