import { describe, expect, test } from 'vitest';
import { printable, qmpErrors } from '../../../lib/qmp/errors.js';
import { qemuSpeed } from '../../../lib/qmp/job-control.js';
import { outcomeOf, stateOf, type JobSample } from '../../../lib/qmp/job-sample.js';

const place = { monitor: 'unix:/run/q', id: 'j', type: 'stream' };

describe('outcomeOf', () => {
  test('no words mean a good end, those of a cancelled job that', () => {
    expect(outcomeOf(place, { error: null, position: 2, total: 2 })).toEqual({ status: 'completed', position: 2, total: 2 });
    expect(outcomeOf(place, { error: 'Operation canceled', position: 1, total: 2 })).toEqual({
      status: 'cancelled',
      position: 1,
      total: 2,
    });
  });

  test.each([
    ['No space left on device', 'ENOSPC', /free some space/],
    ['Disk quota exceeded', 'EDQUOT', /raise the quota/],
    ['Input/output error', 'EIO', /check the storage/],
    ['Something else', 'JOB_FAILED', /Something else; see QEMU’s words/],
  ])('%s is %s', (error, code, message) => {
    const outcome = outcomeOf(place, { error, position: 1, total: 2 });
    expect(outcome).toMatchObject({ status: 'failed', error: { code, desc: error, path: 'unix:/run/q' } });
    expect(outcome.status === 'failed' && outcome.error.message).toMatch(message);
  });
});

test('a job that an error paused says so', () => {
  const sample: JobSample = {
    ...{ id: 'j', type: 'stream', position: 0, total: 1, speed: 0, paused: true, error: null },
    ...{ status: 'paused', ioStatus: 'ok' },
  };
  expect(stateOf(sample)).toBe('paused');
  expect(stateOf({ ...sample, ioStatus: 'nospace' })).toBe('paused-by-error');
  expect(stateOf({ ...sample, status: 'standby', ioStatus: 'failed' })).toBe('paused-by-error');
  // Not there yet: what is in flight comes first.
  expect(stateOf({ ...sample, status: 'running', ioStatus: 'failed' })).toBe('running');
});

test('speeds are QEMU’s: 0 for no limit, and whole bytes', () => {
  expect(qemuSpeed(Infinity)).toBe(0);
  expect(qemuSpeed(0.2)).toBe(1);
  expect(qemuSpeed(1e300)).toBe(Number.MAX_SAFE_INTEGER);
  for (const speed of [0, -1, NaN]) expect(() => qemuSpeed(speed)).toThrow(RangeError);
});

test('text of a peer’s is made safe to print', () => {
  expect(printable('a\u001b[31m\r\nb\u202ec\u0000')).toBe('a [31m b c');
  expect(printable('x'.repeat(501))).toBe(`${'x'.repeat(500)}…`);
  expect(qmpErrors.badAddress('a\u001b\u0007').message).toContain('"a" is no address');
});
