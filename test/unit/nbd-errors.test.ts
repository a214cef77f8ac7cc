import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { nbdErrors, sanitise } from '../../lib/nbd/errors.js';

const PATH = 'nbd://host:10809';

const MADE: { [Name in keyof typeof nbdErrors]: [code: string, make: () => ThickenError] } = {
  uri: ['USAGE', () => nbdErrors.uri('nbd:\x1b', 'it is not')],
  option: ['USAGE', () => nbdErrors.option('lanes is 0', 'give more')],
  lost: ['NBD_LOST', () => nbdErrors.lost(PATH, 'it was closed')],
  protocol: ['NBD_PROTOCOL', () => nbdErrors.protocol(PATH, 'no magic')],
  refused: ['NBD_REFUSED', () => nbdErrors.refused(PATH, 'GO', 'POLICY', 'not\nyou')],
  tooOld: ['NBD_REFUSED', () => nbdErrors.tooOld(PATH, 'it is')],
  tls: ['NBD_TLS', () => nbdErrors.tls(PATH, 'self-signed\ncertificate')],
  timeout: ['NBD_TIMEOUT', () => nbdErrors.timeout(PATH, 'READ got no answer within 5 ms')],
  closed: ['CLOSED', () => nbdErrors.closed(PATH)],
  cancelled: ['CANCELLED', () => nbdErrors.cancelled(PATH)],
  tooLarge: ['RANGE', () => nbdErrors.tooLarge(PATH, 2n ** 63n)],
  range: ['RANGE', () => nbdErrors.range('READ at 5 is not', 'widen it', { path: PATH })],
  notOffered: ['ENOTSUP', () => nbdErrors.notOffered(PATH, 'CACHE')],
  command: ['EIO', () => nbdErrors.command(5, 'READ', 'a\0b', { path: PATH, offset: 0, length: 512 })],
};

describe('an error of the NBD client', () => {
  test.each(Object.entries(MADE))('%s: one line that says what to do', (_, [code, make]) => {
    const error = make();
    expect(error).toBeInstanceOf(ThickenError);
    expect(error.code).toBe(code);
    expect(error.message).toMatch(/^[^\p{Cc}]+; [^\p{Cc}]+$/u);
    expect(error instanceof RangeError).toBe(code === 'RANGE');
  });

  test('carries the errno of what lost the connection', () => {
    const cause = Object.assign(new Error('read ECONNRESET'), { errno: -104 });
    expect(nbdErrors.lost(PATH, cause.message, cause)).toMatchObject({ errno: 104, cause, path: PATH });
  });

  test.each([[1, 'EPERM'], [5, 'EIO'], [12, 'ENOMEM'], [22, 'EINVAL'], [28, 'ENOSPC'], [75, 'EOVERFLOW'], [95, 'ENOTSUP'], [108, 'ESHUTDOWN'], [1234, 'EINVAL']])(
    'of number %i is %s',
    (errno, code) => {
      expect(nbdErrors.command(errno, 'WRITE', '', {})).toMatchObject({ code, errno, syscall: 'WRITE' });
    },
  );
});

test.each([
  ['plain', 'plain'],
  ['\x1b[31mred\x1b[0m', '[31mred [0m'],
  [' a\r\n\tb\u2028c\u202ed\0 ', 'a b c d'],
  ['ü🎉', 'ü🎉'],
  ['\ud800x', 'x'],
  ['🎉'.repeat(300), `${'🎉'.repeat(200)}…`],
  ['\n'.repeat(10_000), ''],
])('%j is shown as %j', (text, shown) => {
  expect(sanitise(text)).toBe(shown);
});
