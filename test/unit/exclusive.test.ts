import { describe, expect, it } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { workUndisturbed } from '../../lib/exclusive.js';
import { NO_WORK, type Work } from '../../lib/native.js';
import { partialOf, withPartial } from '../../lib/outcomes.js';

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

  it('counts what was done before a failure, and by what failed', async () => {
    const failing = (fails: () => Promise<Work>, prove = () => Promise.resolve()) => {
      let turn = 0;
      const work = () => (turn++ < 2 ? Promise.resolve(disturbed(100)) : fails());
      return workUndisturbed('/disk', Float64Array.of(0, 1000), work, prove).catch((error: unknown) => error);
    };
    const full = new ThickenError('ENOSPC', 'no space');
    const part = withPartial(full, { ...NO_WORK, allocated: 30, requests: 1 });
    const reject = (error: unknown) => () => Promise.reject(error as Error);
    const [alone, inPart] = [await failing(reject(full)), await failing(reject(part))];
    const unproven = await failing(reject(full), reject(full));
    for (const error of [alone, inPart, unproven]) expect(error).toMatchObject({ code: 'ENOSPC', message: 'no space' });
    expect(partialOf(alone)).toMatchObject({ allocated: 200, requests: 2 });
    expect(partialOf(inPart)).toMatchObject({ allocated: 230, requests: 3 });
    expect(partialOf(unproven)).toMatchObject({ allocated: 100, requests: 1 });
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
