import { FALLOCATE_UNSHARE } from '../native.js';
import { FallocateSession, GROWING } from './kernel-call.js';
import type { Mechanism, RouteContext } from './route.js';

/**
 * Gives extents that a reflink shares host blocks of their own (xfs). The kernel copies their data
 * meanwhile, so that chunks start smaller than where blocks are only reserved.
 */
export const unshareRoute: Mechanism<RouteContext> = {
  name: 'unshare',
  ...GROWING,
  chunk: { bytes: 16 * 2 ** 20, ranges: 256 },
  open: (context) => FallocateSession.open(context, FALLOCATE_UNSHARE, 1),
};
