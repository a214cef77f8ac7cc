/** Images at rest in formats that QEMU alone writes: its storage daemon maps their clusters. */
import { errors } from '../errors.js';
import { BACKED_DATA, BACKED_ZEROED, meetsLevel } from '../extent.js';
import type { RouteName } from '../types.js';
import type { Kind, PlanFacts, PlanRequest } from './kind.js';

/** Mapping clusters makes the file grow: what it lacks itself comes last. */
const ORDER: RouteName[] = ['populate', 'nbd-write', 'fallocate', 'zero-write', 'stream'];

const REASONS: Record<string, string> = {
  populate: 'content of a backing file: QEMU’s storage daemon copies it into the image, range by range',
  'nbd-write': 'no cluster in the image: QEMU’s storage daemon writes zeros that make it map one',
  fallocate: 'holes of the image’s file: the file system reserves host blocks',
  'zero-write': 'holes of the image’s file, and what is not written of it: zeros are written, under locks',
  stream: 'nothing of the backing file is left to copy: the image is freed from it',
};

export const storedKind: Kind = {
  name: 'an image in a format that QEMU writes, at rest',
  routes: ORDER,
  order: ORDER,

  check({ path }, { level, route }) {
    if (route === 'fallocate' && level === 'full') {
      throw errors.routeCannot(route, 'writes nothing, and full asks for written blocks', path);
    }
  },

  routeFor(state, _facts, { route }) {
    const below = state === BACKED_DATA || state === BACKED_ZEROED;
    if (below && route === 'stream') return route;
    const proper = below ? 'populate' : 'nbd-write';
    return route === undefined || route === proper ? proper : null;
  },

  reasonFor: (route) => REASONS[route]!,

  unreserved,
  whyUnreserved: (bytes) => `has ${bytes} bytes without the host blocks that the level asks for`,

  wholes(facts, request, listed) {
    const { level, route, dropBacking } = request;
    const filler = level === 'full' || !facts.abilities.fallocate ? 'zero-write' : 'fallocate';
    const grows = listed('nbd-write') || listed('populate') || listed('stream');
    const bytes = unreserved(facts, request);
    const fills = level !== 'metadata' && (grows || bytes > 0) && (route === undefined || route === filler);
    return [
      ...(fills ? [{ route: filler, bytes } as const] : []),
      ...(dropBacking && facts.backed && !listed('stream') ? [{ route: 'stream', bytes: 0 } as const] : []),
    ];
  },

  takes(facts, request, bytes) {
    const missing = bytes.reduce((sum, of, state) => (meetsLevel(state, request.level) ? sum : sum + of), 0);
    return missing + unreserved(facts, request);
  },
};

function unreserved({ unreserved: bytes }: PlanFacts, { level }: PlanRequest): number {
  return level === 'metadata' ? 0 : (bytes ?? 0);
}
