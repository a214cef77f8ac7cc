import { describe, expect, it } from 'vitest';
import { NO_WORK } from '../../lib/native.js';
import { partialOf } from '../../lib/outcomes.js';

describe('what was done in spite of a failure', () => {
  it('is the work that the error tells of', () => {
    const partial = { ...NO_WORK, allocated: 4096, requests: 1 };
    expect(partialOf(new Error('EIO', { cause: { partial } }))).toEqual(partial);
  });

  it.each([
    ['a page of extents', { offset: new Float64Array(1), next: 512 }],
    ['the progress of a qcow2 call', { next: 65536, mapped: 65536, beside: 0 }],
    ['nothing', undefined],
  ])('is nothing where the call that failed had %s', (_, partial) => {
    expect(partialOf(new Error('EIO', { cause: { partial } }))).toEqual(NO_WORK);
    expect(partialOf(new Error('EIO'))).toEqual(NO_WORK);
  });
});
