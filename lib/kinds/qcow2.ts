/** qcow2 images at rest. */
import { errors } from '../errors.js';
import { ABSENT, BACKED_DATA, BACKED_ZERO, BACKED_ZEROED, hostOf, SHARED } from '../extent.js';
import { BELOW, PLAIN_ZEROS, UNMAPPED } from '../mapped.js';
import type { Kind } from './kind.js';

const REASONS = {
  metadata: 'not mapped: a cluster for each, entered into the image’s tables',
  falloc: 'not mapped, or without host blocks: clusters, and blocks for them',
  full: 'not mapped, or not written: clusters, and zeros written to them, under locks',
};

/** What the image has no cluster for because a layer below has the content, or might have had. */
const FROM_BELOW = new Set([BELOW, BACKED_DATA, BACKED_ZERO, BACKED_ZEROED, ABSENT]);
/** What of that has no storage when it has been copied: a cluster that is said to be zeros. */
const COPIED_AS_ZEROS = [BACKED_ZERO, BACKED_ZEROED, ABSENT];

export const qcow2Kind: Kind = {
  name: 'a qcow2 image at rest',
  routes: ['populate', 'stream', 'qcow2'],

  check({ path, backed, opened, subclusters }, { route }) {
    if (route !== 'populate' && route !== 'stream') return;
    if (backed && !opened) throw errors.belowWanted(path);
    if (route === 'stream' && subclusters) {
      throw errors.routeCannot(route, 'would end QEMU where clusters are mapped in parts', path);
    }
  },

  /** What is copied range by range is faster than a stream, and ends when it is told to. */
  routeFor(state, { abilities }, { route }) {
    if (FROM_BELOW.has(state)) return route === 'qcow2' ? null : (route ?? 'populate');
    if (route === 'populate' || route === 'stream') return null;
    return hostOf(state) === SHARED && !abilities.unshare ? null : 'qcow2';
  },

  reasonFor(route, _facts, { level }) {
    if (route === 'populate') return 'content of a backing file: QEMU’s storage daemon copies it into the image';
    if (route === 'stream') return 'the image is freed from its backing file, of which nothing is left to copy';
    return REASONS[level];
  },

  unreserved: ({ unreserved }, { level }) => (level === 'metadata' ? 0 : (unreserved ?? 0)),

  wholes({ backed, opened, leaked = 0, unreserved }, { level, route, dropBacking }, listed, bytes) {
    const drops = dropBacking && backed && opened && !listed('stream');
    const sumOf = (states: number[]) => states.reduce((sum, state) => sum + bytes[state]!, 0);
    const reserve = level === 'metadata' ? 0 : (unreserved ?? 0);
    const copies = listed('populate') && route === undefined;
    // What has been copied as zeros is known only then: the pass reads the map of that time.
    const zeros = copies ? sumOf([...COPIED_AS_ZEROS, UNMAPPED, PLAIN_ZEROS]) : 0;
    const allocates = zeros > 0 || (!copies && !listed('qcow2') && (reserve > 0 || leaked > 0));
    return [
      ...(drops ? [{ route: 'stream' as const, bytes: 0 }] : []),
      ...(allocates ? [{ route: 'qcow2' as const, bytes: zeros || reserve }] : []),
    ];
  },

  copies: (state, { tellsZeros }) =>
    state === BACKED_DATA || (tellsZeros === false && COPIED_AS_ZEROS.includes(state)),

  takes: ({ takes }) => takes ?? null,
};
