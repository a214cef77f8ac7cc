import { FALLOCATE_RESERVE } from '../native.js';
import { FallocateSession, GROWING } from './kernel-call.js';
import type { Route } from './route.js';

/** Reserves host blocks behind holes; safe under a running guest. */
export const fallocateRoute: Route = {
  name: 'fallocate',
  ...GROWING,
  open: (context) => FallocateSession.open(context, FALLOCATE_RESERVE),
};
