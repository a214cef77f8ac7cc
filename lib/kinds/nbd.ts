/** Exports of NBD servers. */
import { errors } from '../errors.js';
import type { Kind } from './kind.js';

export const nbdKind: Kind = {
  name: 'an export of an NBD server',
  routes: ['nbd-write'],

  check({ path }, { level }) {
    if (level === 'metadata') throw errors.levelForRaw(path, level);
  },

  routeFor: () => 'nbd-write',

  reasonFor(_route, { abilities }, { level }) {
    if (level === 'full') return 'read, and zeros written as data where it reads as zero';
    return abilities.fallocate
      ? 'read, and allocated by the server where it reads as zero'
      : 'the server can’t be told to allocate: read, and zeros written where it reads as zero';
  },
};
