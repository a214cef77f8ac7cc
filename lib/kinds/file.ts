/** Raw image files. */
import { errors } from '../errors.js';
import { SHARED } from '../extent.js';
import type { RouteName } from '../types.js';
import type { Kind, PlanFacts, PlanRequest } from './kind.js';

export const fileKind: Kind = {
  name: 'a file',
  routes: ['unshare', 'fallocate', 'zero-write'],

  check({ path }, { level, route }) {
    if (level === 'metadata') throw errors.levelForRaw(path, level);
    if (route === 'fallocate' && level === 'full') {
      throw errors.routeCannot(route, 'writes nothing, and full asks for written blocks', path);
    }
  },

  routeFor(state, { abilities }, request) {
    if (state === SHARED) return wanted('unshare', request) && abilities.unshare ? 'unshare' : null;
    if (request.level === 'full') return wanted('zero-write', request) ? 'zero-write' : null;
    if (request.route === 'zero-write' || request.route === 'fallocate') return request.route;
    if (!wanted('fallocate', request)) return null;
    return abilities.fallocate ? 'fallocate' : 'zero-write';
  },

  reasonFor(route, facts, request) {
    if (route === 'unshare') return 'shared with another file: it gets host blocks of its own';
    if (route === 'fallocate') return 'no host blocks: the file system reserves them';
    return whyZeros(facts, request);
  },
};

/** A forced route leaves to others only what it can't do by nature: none but `unshare` unshares. */
function wanted(route: RouteName, request: PlanRequest): boolean {
  if (request.route === undefined || request.route === route) return true;
  return route === 'unshare';
}

function whyZeros({ abilities }: PlanFacts, { level }: PlanRequest): string {
  if (level === 'full') return 'not written: zeros are written, under locks';
  return abilities.fallocate
    ? 'no host blocks: zeros are written, under locks, as asked'
    : 'no host blocks, and no fallocate here: zeros are written, under locks';
}
