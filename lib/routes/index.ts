import { deviceRoute } from './device.js';
import { fallocateRoute } from './fallocate.js';
import type { Mechanism, RouteContext } from './route.js';
import { unshareRoute } from './unshare.js';
import { zeroWriteRoute } from './zero-write.js';

/** Routes of files and block devices that thicken changes itself. */
export const FILE_ROUTES = {
  fallocate: fallocateRoute,
  unshare: unshareRoute,
  'zero-write': zeroWriteRoute,
  device: deviceRoute,
} satisfies Record<string, Mechanism<RouteContext>>;
