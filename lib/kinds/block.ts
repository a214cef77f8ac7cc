/** Block devices. */
import { errors } from '../errors.js';
import { SHARED } from '../extent.js';
import type { Kind } from './kind.js';

export const blockKind: Kind = {
  name: 'a block device',
  routes: ['device'],

  check({ path }, { level }) {
    if (level === 'metadata') throw errors.levelForRaw(path, level);
  },

  routeFor: (state) => (state === SHARED ? null : 'device'),

  reasonFor: (_route, _facts, { level }) =>
    level === 'full'
      ? 'read, and zeros written where it reads as zero'
      : 'read, and zeroed out by the kernel where it reads as zero',
};
