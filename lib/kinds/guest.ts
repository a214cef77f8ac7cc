/** Images in a format, which the QEMU that has them open changes. */
import { errors } from '../errors.js';
import type { Kind } from './kind.js';

const REASONS: Record<string, string> = {
  populate: 'content of a backing file: QEMU copies it into the image, range by range',
  stream: 'content of a backing file: QEMU streams the whole disk',
  reserve: 'host blocks for what guest writes may need, up to the whole disk',
};

export const guestKind: Kind = {
  name: 'an image in a format that a guest uses',
  routes: ['populate', 'stream', 'reserve'],

  check({ path, subclusters }, { level, route }) {
    if (level === 'full') throw errors.needsWindow(path);
    if (route === 'stream' && subclusters) {
      throw errors.routeCannot(route, 'would end QEMU where clusters are mapped in parts', path);
    }
  },

  /** The whole disk is streamed only where its backing file is to go, or on request. */
  routeFor(_state, { subclusters }, { route, dropBacking }) {
    if (route === 'reserve') return null;
    return route ?? (dropBacking && !subclusters ? 'stream' : 'populate');
  },

  reasonFor: (route) => REASONS[route]!,
};
