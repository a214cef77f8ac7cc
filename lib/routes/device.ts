import { DeviceHold } from '../device-hold.js';
import { DEVICE_WRITE, DEVICE_ZERO_OUT, native, type CancelFlag } from '../native.js';
import type { Mechanism, RouteContext, RouteSession } from './route.js';

const MIB = 2 ** 20;

/** Reads a block device that nobody else uses, and backs what reads as zero. */
class DeviceSession implements RouteSession {
  constructor(
    private readonly context: RouteContext,
    private readonly hold: DeviceHold,
  ) {}

  run(ranges: Float64Array, cancel: CancelFlag) {
    const { level, granularity } = this.context;
    const mode = level === 'full' ? DEVICE_WRITE : DEVICE_ZERO_OUT;
    return this.hold.run(ranges, (rest, fd, gate) =>
      native().allocateDevice(fd, mode, granularity, gate, rest, cancel),
    );
  }

  sync() {
    return this.hold.sync();
  }

  async [Symbol.asyncDispose]() {
    await this.hold[Symbol.asyncDispose]();
  }
}

export const deviceRoute: Mechanism<RouteContext> = {
  name: 'device',
  chunk: { bytes: 8 * MIB, ranges: 1024 },
  most: { bytes: 8 * MIB, ranges: 1024 },
  depth: 3,
  adapts: 'no',
  open: async (context) =>
    new DeviceSession(context, await DeviceHold.take(context.image, context.exclusive)),
};
