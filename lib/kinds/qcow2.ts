/** qcow2 images at rest. */
import { errors } from '../errors.js';
import { hostOf, SHARED } from '../extent.js';
import { BELOW } from '../mapped.js';
import type { Kind } from './kind.js';

const REASONS = {
  metadata: 'not mapped: a cluster for each, entered into the image’s tables',
  falloc: 'not mapped, or without host blocks: clusters, and blocks for them',
  full: 'not mapped, or not written: clusters, and zeros written to them, under locks',
};

export const qcow2Kind: Kind = {
  name: 'a qcow2 image at rest',
  routes: ['populate', 'qcow2'],

  check({ path }, { route }) {
    if (route === 'populate') throw errors.routeCannot(route, 'is not for images at rest yet', path);
  },

  routeFor(state, { abilities }) {
    if (state === BELOW) return 'populate';
    return hostOf(state) === SHARED && !abilities.unshare ? null : 'qcow2';
  },

  reasonFor: (route, _facts, { level }) =>
    route === 'populate' ? 'content of a backing file: it is copied into the image' : REASONS[level],

  unreserved: ({ unreserved }, { level }) => (level === 'metadata' ? 0 : (unreserved ?? 0)),

  wholes({ leaked = 0, unreserved }, { level }, listed) {
    const bytes = level === 'metadata' ? 0 : (unreserved ?? 0);
    return !listed('qcow2') && (bytes > 0 || leaked > 0) ? [{ route: 'qcow2', bytes }] : [];
  },

  takes: ({ takes }) => takes ?? null,
};
