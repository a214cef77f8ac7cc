import { holdFile } from './hold-file.js';
import type { Mechanism, RouteContext, RouteSession } from './route.js';
import { ZERO_CHUNK, ZeroWriter } from './zero-writer.js';

/** Where direct writes into reserved blocks run side by side. */
const RESERVED = new Set(['ext4', 'xfs']);

/** Writes zeros into what reads as zero, in a file that nobody else writes to. */
async function openZeroWrite(context: RouteContext): Promise<RouteSession> {
  const { image, exclusive, granularity, size } = context;
  const filesystem = context.filesystem!;
  const hold = await holdFile(image, filesystem, { trusted: exclusive });
  const writer = new ZeroWriter(hold, { filesystem, granularity });
  const reserves = RESERVED.has(filesystem.type) && filesystem.abilities.fallocate && !context.keepsFree;
  return {
    ...(reserves && { prepare: (ranges, cancel) => writer.reserve(ranges, size, cancel) }),
    run: (ranges, cancel) => writer.write(ranges, size, cancel),
    sync: () => hold.sync(),
    [Symbol.asyncDispose]: () => hold[Symbol.asyncDispose](),
  };
}

export const zeroWriteRoute: Mechanism<RouteContext> = {
  name: 'zero-write',
  ...ZERO_CHUNK,
  adapts: 'no',
  open: openZeroWrite,
};
