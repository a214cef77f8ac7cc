import { FALLOCATE_RESERVE } from '../native.js';
import { FallocateSession, GROWING, HOLES_PER_CALL } from './kernel-call.js';
import type { Mechanism, RouteContext } from './route.js';

/** Reserves host blocks behind holes; safe under a running guest. */
export const fallocateRoute: Mechanism<RouteContext> = {
  name: 'fallocate',
  ...GROWING,
  open: (context) => FallocateSession.open(context, FALLOCATE_RESERVE, HOLES_PER_CALL),
};
