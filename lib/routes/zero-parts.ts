/** Where content ends and zeros begin, in whole clusters. */
import { BASE_ALLOCATION, type NbdClient } from '../nbd/client.js';
import { STATE_ZERO } from '../nbd/protocol.js';
import { statusPages } from '../nbd/status-stream.js';
import { endOf, widen } from '../range.js';
import type { ByteRange } from '../types.js';

/**
 * A range of whole clusters cut where zeros begin and end; a cluster of both is none of zeros. What
 * QEMU copies by one request becomes data as a whole unless all of it reads as zeros (7.2).
 */
export async function zeroParts(nbd: NbdClient, range: ByteRange, cluster: number): Promise<ByteRange[]> {
  const parts: ByteRange[] = [];
  let done = range.offset;
  for await (const { offset, length, flags } of statusPages(nbd, range, { contexts: [BASE_ALLOCATION], lanes: 1 })) {
    for (let i = 0; i < length.length; i++) {
      if ((flags[0]![i]! & STATE_ZERO) !== 0) continue;
      const data = widen({ offset: offset[i]!, length: length[i]! }, cluster, nbd.size);
      const last = parts.at(-1);
      if (last && data.offset <= done && done > range.offset) {
        last.length = Math.max(done, endOf(data)) - last.offset;
      } else {
        if (data.offset > done) parts.push({ offset: done, length: data.offset - done });
        parts.push({ ...data });
      }
      done = Math.max(done, endOf(data));
    }
  }
  if (done < endOf(range)) parts.push({ offset: done, length: endOf(range) - done });
  return parts;
}
