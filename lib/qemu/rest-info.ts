/** What is told of the layers below an image at rest. */
import type { Chain } from '../chain/chain.js';
import { ABSENT, UNALLOCATED } from '../extent.js';
import type { ByteRange, ImageInfo } from '../types.js';
import type { RestSource } from './rest-source.js';

/** With how much of the image's content comes from each. */
export async function layersInfo(source: RestSource, chain: Chain, range: ByteRange): Promise<ImageInfo['backing']> {
  const bytes = new Array<number>(chain.layers.length).fill(0);
  for await (const { length, state, depth } of source.pages(range)) {
    length.forEach((amount, i) => {
      if (state[i] !== ABSENT && state[i] !== UNALLOCATED) bytes[depth?.[i] ?? 0]! += amount;
    });
  }
  const sizes = await virtualSizes(source);
  return chain.below.map(({ path, format, virtualSize }, i) => ({
    path,
    format,
    virtualSize: virtualSize ?? sizes.get(`layer${i + 1}`) ?? null,
    allocated: bytes[i + 1]!,
  }));
}

/** By node. */
async function virtualSizes(source: RestSource): Promise<Map<string, number>> {
  const { daemon } = await source.engine();
  const nodes = await daemon.qmp.execute('query-named-block-nodes', { flat: true });
  return new Map(nodes.map((node) => [node['node-name'] ?? '', node.image['virtual-size']]));
}
