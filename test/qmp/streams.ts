import { startDetachedStream } from '../../lib/qmp/block-jobs.js';
import { QmpClient } from '../../lib/qmp/client.js';
import { startQemu, type Qemu } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';
import { chain, MiB } from './images.js';

export const STREAM_SIZE = 64 * MiB;
/** So slow that no test sees the end, and yet it moves. */
export const CRAWL = 256 * 1024;

/**
 * A storage daemon whose monitor is free, with one image (node `disk`, `disk1`, …) and one crawling
 * block-stream on it for each id; without ids, with the image alone.
 */
export async function daemonWith(...ids: string[]): Promise<Qemu> {
  const { overlay } = await chain(STREAM_SIZE);
  const qemu = await startQemu({ file: overlay, format: 'qcow2' });
  await using client = await QmpClient.connect(qemu.qmp);
  for (const [i, jobId] of ids.entries()) {
    const device = i === 0 ? 'disk' : `disk${i}`;
    if (i > 0) await addChain(client, device);
    await startDetachedStream(client, { device, jobId, speed: CRAWL });
  }
  return qemu;
}

async function addChain(client: QmpClient, node: string): Promise<void> {
  const { overlay } = await chain(STREAM_SIZE, scratchPath(node));
  const file = { driver: 'file', filename: overlay };
  await client.execute('blockdev-add', { driver: 'qcow2', 'node-name': node, file });
}
