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

  async runWhole(control: WholeControl): Promise<void> {
    const { client, node, nbd } = this.context;
    const { speed } = control.limits();
    await using job = await startStream(
      client,
      // The export's name: whoever takes the one away finds the other.
      { device: node, jobId: nbd.exportName, speed: Number.isFinite(speed) ? speed : undefined },
      // The tables that map the copies must be on the disk before the header says that all is there.
      { signal: control.signal, beforeFinalize: () => flush(this.context) },
    );
    const stop = follow(job, control);
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

/** Passes on what the run is told, and tells what the job does. */
function follow(job: BlockJob, control: WholeControl): () => void {
  let position = 0;
  job.on('progress', (progress) => {
    const done = progress.position - position;
    position = progress.position;
    if (done > 0) control.completed({ ...NO_WORK, allocated: done });
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
