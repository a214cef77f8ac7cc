import { describe, expect, it } from 'vitest';
import { workUndisturbed } from '../../lib/exclusive.js';
import { NO_WORK, type Work } from '../../lib/native.js';

const disturbed = (allocated: number): Work => ({ ...NO_WORK, allocated, requests: 1, disturbed: true });

describe('work that opens of the image disturb', () => {
  it('ends in IN_USE where nothing gets done between them', async () => {
    let proofs = 0;
    const work = workUndisturbed(
      '/disk',
      Float64Array.of(0, 4096),
      () => Promise.resolve(disturbed(0)),
      () => Promise.resolve(void proofs++),
    );
    await expect(work).rejects.toMatchObject({ code: 'IN_USE', path: '/disk' });
    expect(proofs).toBeLessThan(1000);
  });

  it('goes on as long as something gets done, however often it is disturbed', async () => {
    const begun: number[] = [];
    const work = await workUndisturbed(
      '/disk',
      Float64Array.of(0, 1000),
      (rest) => {
        begun.push(rest[0]!);
        const last = rest[1] === 1;
        return Promise.resolve({ ...disturbed(1), disturbed: !last });
      },
      () => Promise.resolve(),
    );
    expect(work).toMatchObject({ allocated: 1000, requests: 1000, disturbed: false });
    expect(begun).toEqual(Array.from({ length: 1000 }, (_, i) => i));
  });
});
