import type { Descriptor } from '../descriptor.js';
import { holdDevice } from '../exclusive.js';
import { DEVICE_WRITE, DEVICE_ZERO_OUT, native, SYNC_FILE, type CancelFlag } from '../native.js';
import type { Route, RouteContext, RouteSession } from './route.js';

const MIB = 2 ** 20;

/** Reads a block device that nothing else uses, and backs what reads as zero. */
class DeviceSession implements RouteSession {
  constructor(
    private readonly context: RouteContext,
    private readonly device: Descriptor,
  ) {}

  run(ranges: Float64Array, cancel: CancelFlag) {
    const mode = this.context.level === 'full' ? DEVICE_WRITE : DEVICE_ZERO_OUT;
    return this.device.use((fd) =>
      native().allocateDevice(fd, mode, this.context.granularity, ranges, cancel),
    );
  }

  sync() {
    return this.device.use((fd) => native().syncFile(fd, SYNC_FILE));
  }

  async [Symbol.asyncDispose]() {
    await this.device.close();
  }
}

export const deviceRoute: Route = {
  name: 'device',
  chunk: { bytes: 8 * MIB, ranges: 1024 },
  most: { bytes: 8 * MIB, ranges: 1024 },
  depth: 3,
  open: async (context) =>
    new DeviceSession(context, await holdDevice(context.image, context.exclusive)),
};
