import { expect, test } from 'vitest';
import { OWN_DATA } from '../../lib/extent.js';
import type { JobImage } from '../../lib/job-image.js';
import { Job } from '../../lib/job.js';
import { ALWAYS_LIVE } from '../../lib/liveness.js';
import { NO_WORK } from '../../lib/native.js';
import type { PlanFacts } from '../../lib/plan.js';
import type { Route, RouteSession } from '../../lib/routes/route.js';
import { pageOf } from './pages.js';

const SIZE = 16 * 65_536;

/** A guest's image all of which is mapped; what it needs in reserve is looked at by `check` alone. */
function guestImage(needs: number[]): JobImage & { passes: number } {
  let held = 0;
  let unreserved = 0;
  const session: RouteSession = {
    run: () => Promise.reject(new Error('whole')),
    runWhole: (control, bytes) => {
      image.passes++;
      held += unreserved;
      control.completed({ ...NO_WORK, allocated: bytes });
      return Promise.resolve();
    },
    sync: () => Promise.resolve(),
    [Symbol.asyncDispose]: () => Promise.resolve(),
  };
  const bounds = { bytes: SIZE, ranges: 1 };
  const route: Route = { name: 'reserve', chunk: bounds, most: bounds, depth: 1, adapts: 'no', open: async () => session };
  const image: JobImage & { passes: number } = {
    path: 'monitor#disk', format: 'qcow2', size: SIZE, granularity: 65_536,
    source: {
      method: null, filesystem: null, file: null,
      async *pages() {
        yield pageOf([{ offset: 0, length: SIZE, state: OWN_DATA }]);
      },
      [Symbol.asyncDispose]: () => Promise.resolve(),
    },
    get facts(): PlanFacts {
      return { path: 'monitor#disk', kind: 'guest', abilities: { fallocate: false, unshare: false }, unreserved };
    },
    storage: null, liveness: ALWAYS_LIVE, exact: true, noGuarantee: null, warnings: [],
    check: async () => void (unreserved = Math.max(0, (needs.length > 1 ? needs.shift()! : needs[0]!) - held)),
    route: () => route,
    passes: 0,
  };
  return image;
}

test('what a snapshot taken meanwhile needs is reserved too, by what is looked at anew', async () => {
  const image = guestImage([1000, 3000, 3000]);
  expect(await new Job(image, {}).result).toMatchObject({ verified: true, guarantee: true });
  expect(image.passes).toBe(2);
});

test('a need that grows as fast as it is met ends in an error, not in a claim', async () => {
  const image = guestImage([1000, 2000, 3000, 4000, 5000, 6000]);
  await expect(new Job(image, {}).result).rejects.toMatchObject({ code: 'NOT_VERIFIED' });
  expect(image.passes).toBe(3);
});

test('space that can’t be kept free from here is told', async () => {
  const { warnings } = await new Job(guestImage([0]), { keepFree: 4096 }).result;
  expect(warnings.join()).toMatch(/can’t be seen from here/);
});
