/** Images in a format, which the QEMU that has them open changes. */
import { errors } from '../errors.js';
import type { Kind, PlanFacts, PlanRequest } from './kind.js';

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

  unreserved,

  wholes(facts, request, listed) {
    const bytes = unreserved(facts, request);
    const drops = request.dropBacking && facts.backed && !listed('stream');
    return [
      ...(bytes > 0 ? [{ route: 'reserve' as const, bytes }] : []),
      ...(drops ? [{ route: 'stream' as const, bytes: 0 }] : []),
    ];
  },

  takes: (facts, request) => unreserved(facts, request) || null,
};

function unreserved(facts: PlanFacts, { level, route }: PlanRequest): number {
  const asked = level === 'falloc' && (route === undefined || route === 'reserve');
  return asked ? (facts.unreserved ?? 0) : 0;
}
