/** Images at rest that lie on others, or that only QEMU can change: its storage daemon does. */
import { errors } from '../errors.js';
import type { Kind } from './kind.js';

const REASONS: Record<string, string> = {
  populate: 'content of a backing file: QEMU’s storage daemon copies it into the image, range by range',
  stream: 'nothing of the backing file is left to copy: the image is freed from it',
};

export const restKind: Kind = {
  name: 'an image in a format, at rest',
  routes: ['populate', 'stream'],

  check({ path, subclusters }, { level, route }) {
    if (level !== 'metadata') throw errors.metadataOnly(path, level);
    if (route === 'stream' && subclusters) {
      throw errors.routeCannot(route, 'would end QEMU where clusters are mapped in parts', path);
    }
  },

  /** What is copied range by range is faster than a stream, and ends when it is told to. */
  routeFor: (_state, _facts, { route }) => route ?? 'populate',

  reasonFor: (route) => REASONS[route]!,

  wholes({ backed }, { dropBacking }, listed) {
    return dropBacking && backed && !listed('stream') ? [{ route: 'stream', bytes: 0 }] : [];
  },
};
