import { NO_WORK } from '../native.js';
import { startStream, type BlockJob } from '../qmp/block-jobs.js';
import { errors } from '../errors.js';
import { flush, type GuestContext } from './populate.js';
import type { Mechanism, RouteSession, WholeControl } from './route.js';

/**
 * QEMU's own block-stream, of the whole disk. At its end nothing is below the image any more, in
 * the graph and in the image's header.
 */
class StreamSession implements RouteSession {
  constructor(private readonly context: GuestContext) {}

  run(): never {
    throw new Error('a stream takes the whole disk');
  }

  async runWhole(control: WholeControl, bytes: number): Promise<void> {
    const { client, node, nbd } = this.context;
    const { speed } = control.limits();
    await using job = await startStream(
      client,
      // The export's name: whoever takes the one away finds the other.
      { device: node, jobId: nbd.exportName, speed: Number.isFinite(speed) ? speed : undefined },
      // The tables that map the copies must be on the disk before the header says that all is there.
      { signal: control.signal, beforeFinalize: () => flush(this.context) },
    );
    const stop = follow(job, control, bytes);
    try {
      const outcome = await job.outcome;
      if (outcome.status === 'failed') throw outcome.error;
      if (outcome.status === 'cancelled') throw errors.cancelled(client.name);
    } finally {
      stop();
    }
    await flush(this.context);
  }

  sync(): Promise<void> {
    return flush(this.context);
  }

  async [Symbol.asyncDispose](): Promise<void> {}
}

/**
 * Passes on what the run is told, and tells what the job does. The job counts what it passes over
 * too: its share of the whole is taken for the share of what is missing.
 */
function follow(job: BlockJob, control: WholeControl, bytes: number): () => void {
  let reached = 0;
  job.on('progress', ({ position, total }) => {
    const now = total > 0 ? Math.floor((position / total) * bytes) : 0;
    if (now > reached) control.completed({ ...NO_WORK, allocated: now - reached });
    reached = Math.max(reached, now);
  });
  const ignore = () => undefined;
  control.steer({
    setSpeed: (bytes) => void job.setSpeed(bytes).catch(ignore),
    pause: () => void job.pause().catch(ignore),
    resume: () => void job.resume().catch(ignore),
  });
  return () => control.steer(undefined);
}

export const streamRoute: Mechanism<GuestContext> = {
  name: 'stream',
  chunk: { bytes: Infinity, ranges: Infinity },
  most: { bytes: Infinity, ranges: Infinity },
  depth: 1,
  adapts: 'no',
  open: (context) => Promise.resolve(new StreamSession(context)),
};
