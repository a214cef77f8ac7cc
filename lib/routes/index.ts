import type { RouteName } from '../types.js';
import { deviceRoute } from './device.js';
import { fallocateRoute } from './fallocate.js';
import type { Route } from './route.js';
import { unshareRoute } from './unshare.js';
import { zeroWriteRoute } from './zero-write.js';

export const ROUTES: Record<RouteName, Route> = {
  fallocate: fallocateRoute,
  unshare: unshareRoute,
  'zero-write': zeroWriteRoute,
  device: deviceRoute,
};

export type { Route, RouteContext, RouteSession } from './route.js';
