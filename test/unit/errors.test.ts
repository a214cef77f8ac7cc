import fc from 'fast-check';
import { constants } from 'node:os';
import { describe, expect, test } from 'vitest';
import {
  errorJson,
  errors,
  isRawSystemError,
  rangeError,
  systemError,
  ThickenError,
  toThickenError,
  usageError,
  withDetails,
} from '../../lib/errors.js';

const PATH = '/images/a disk.raw';

/** Each factory, called as lib/ calls it, and its code. */
const MADE: { [Name in keyof typeof errors]: [code: string, make: (path: string) => ThickenError][] } = {
  notAnImage: [
    ['EISDIR', (path) => errors.notAnImage(path, 'directory')],
    ['UNSUPPORTED', (path) => errors.notAnImage(path, 'FIFO')],
  ],
  noLock: [['IN_USE', (path) => errors.noLock(path)]],
  readOnlyExport: [['UNSUPPORTED', (path) => errors.readOnlyExport(path)]],
  formatRequired: [['FORMAT_REQUIRED', (path) => errors.formatRequired(path, 'qcow2')]],
  unsupportedFormat: [['UNSUPPORTED', (path) => errors.unsupportedFormat(path, 'qcow2')]],
  qcow2OnDevice: [['UNSUPPORTED', errors.qcow2OnDevice]],
  belowWanted: [['FORMAT_REQUIRED', (path) => errors.belowWanted(path)]],
  needsPopulate: [['NEEDS_POPULATE', (path) => errors.needsPopulate(path, 65536, 65536)]],
  needsWindow: [['NEEDS_WINDOW', errors.needsWindow]],
  levelForRaw: [['USAGE', (path) => errors.levelForRaw(path, 'metadata')]],
  routeCannot: [['USAGE', (path) => errors.routeCannot('device', 'is not for a file', path)]],
  inUse: [['IN_USE', (path) => errors.inUse(path, 'qemu (pid 5)', 'stop it, or use --qmp')]],
  openedOverAndOver: [['IN_USE', (path) => errors.openedOverAndOver(path)]],
  cannotTellUsers: [['IN_USE', (path) => errors.cannotTellUsers(path, 'fcntl answers EINVAL')]],
  noSpace: [
    ['ENOSPC', (path) => errors.noSpace(path, 300, 100, false)],
    ['EDQUOT', (path) => errors.noSpace(path, 300, 100, true)],
  ],
  keepFree: [['KEEP_FREE', (path) => errors.keepFree(path, 100, 50)]],
  cancelled: [['CANCELLED', (path) => errors.cancelled(path)]],
  changed: [['CHANGED', (path) => errors.changed(path, 'the size went from 1 to 2 bytes')]],
  closed: [['CLOSED', (path) => errors.closed(path)]],
  notVerified: [
    ['NOT_VERIFIED', (path) => errors.notVerified(path, 4096, false)],
    ['NOT_VERIFIED', (path) => errors.notVerified(path, 4096, true)],
  ],
  addonLoad: [['ADDON_LOAD', () => errors.addonLoad(new Error('no such file'), 'linux x64')]],
};
const ALL = Object.entries(MADE).flatMap(([name, cases]) => cases.map(([code, make]) => ({ name, code, make })));

function rawError(errno: number, syscall?: string, message = 'what the system says') {
  return Object.assign(new Error(message), { errno, ...(syscall && { syscall }) });
}

describe('an error made by a factory', () => {
  test('is known to this test, whichever it is', () => {
    expect(Object.keys(MADE).sort()).toEqual(Object.keys(errors).sort());
  });

  test.each(ALL)('$name: $code, in one line that says what to do', ({ code, make }) => {
    const error = make(PATH);
    expect(error).toBeInstanceOf(ThickenError);
    expect(error).toBeInstanceOf(Error);
    expect(error.code).toBe(code);
    expect(error.message).toMatch(/^[^\n]{10,}; [^\n]{10,}$/);
    expect(error.message).not.toMatch(/undefined|null|NaN|\[object/);
  });

  test.each(ALL.filter(({ name }) => name !== 'addonLoad'))('$name names the file', ({ make }) => {
    expect(make(PATH).path).toBe(PATH);
    expect(make(PATH).message).toContain(JSON.stringify(PATH));
  });

  test.each(ALL)('$name stays one line, whatever the file is called', ({ make }) => {
    fc.assert(fc.property(fc.string(), (path) => !/[\n\r]/.test(make(path).message)));
    expect(make('a\nb\rc\u001b[31m').message).not.toMatch(/\p{Cc}/u);
  });

  test('without enough space says what was needed, was there, and is missing', () => {
    const error = errors.noSpace(PATH, 300, 100, false);
    expect(error).toMatchObject({ needed: 300, available: 100 });
    expect(error.message).toMatch(/300 .* 100 .* 200 /);
  });
});

describe('a system error', () => {
  test.each(['ENOENT', 'EACCES', 'EPERM', 'EROFS', 'ENOSPC', 'EDQUOT', 'EIO', 'EFBIG', 'ETXTBSY', 'EINVAL', 'EOPNOTSUPP', 'EBUSY', 'EMFILE', 'ELOOP'])(
    'has the name of its errno as code: %s',
    (name) => {
      const errno = constants.errno[name as keyof typeof constants.errno];
      for (const sign of [1, -1]) {
        const error = systemError(rawError(sign * errno, 'fallocate'), PATH);
        expect(error).toMatchObject({ code: name, errno, syscall: 'fallocate', path: PATH });
        expect(error.message).toMatch(/^[^\n]+: fallocate on "[^\n]+; [^\n]+$/);
      }
    },
  );

  test('is called CHANGED where the image was truncated meanwhile', () => {
    expect(systemError(rawError(constants.errno.ESTALE), PATH).code).toBe('CHANGED');
  });

  test('has a code without a space even where the number is one that libraries do not know', () => {
    for (const errno of [117, 524, 4000]) {
      expect(systemError(rawError(errno), PATH).code).toMatch(/^[A-Z0-9_]+$/);
    }
  });

  test('names the bytes where it knows them', () => {
    const raw = Object.assign(rawError(5, 'pwrite'), { offset: 4096, length: 8192 });
    const error = systemError(raw, PATH);
    expect(error).toMatchObject({ offset: 4096, length: 8192, cause: raw });
    expect(error.message).toContain('bytes 4096 to 12287');
  });

  test('does not name the file twice', () => {
    const raw = rawError(-constants.errno.ELOOP, 'open', `ELOOP: too many symbolic links encountered, open '${PATH}'`);
    expect(systemError(raw, PATH).message.split(PATH).length - 1).toBe(1);
  });

  test('is told from other errors by its number', () => {
    expect(isRawSystemError(rawError(-2))).toBe(true);
    expect(isRawSystemError(new Error('x'))).toBe(false);
    expect(isRawSystemError({ errno: 2 })).toBe(false);
    expect(isRawSystemError(systemError(rawError(2), PATH))).toBe(false);
  });
});

describe('errorJson', () => {
  test('has the fields of the contract and no other', () => {
    const error = withDetails(errors.noSpace(PATH, 3, 1, false), {
      errno: 28, syscall: 'fallocate', offset: 0, length: 1, done: {} as never, cause: 'x',
    });
    const text = JSON.stringify(errorJson(error));
    expect(Object.keys(JSON.parse(text) as object).sort()).toEqual(
      ['available', 'code', 'errno', 'length', 'message', 'needed', 'offset', 'path', 'syscall'],
    );
  });

  test('leaves out what is not known', () => {
    const text = JSON.stringify(errorJson(errors.addonLoad(null, 'x')));
    expect(Object.keys(JSON.parse(text) as object)).toEqual(['code', 'message']);
  });
});

describe('the class', () => {
  test('of a range error is RangeError too', () => {
    const error = rangeError('the offset is odd', 'give another', { path: PATH });
    expect(error).toBeInstanceOf(RangeError);
    expect(error).toBeInstanceOf(ThickenError);
    expect(error).toMatchObject({ code: 'RANGE', path: PATH });
  });

  test('of other errors is not RangeError', () => {
    expect(usageError('no', 'yes')).not.toBeInstanceOf(RangeError);
  });

  test.each([[new Error('x')], [new RangeError('x')], [{ code: 'RANGE' }], [null], [undefined], ['RANGE']])(
    'does not take %o for its own',
    (value) => expect(value).not.toBeInstanceOf(ThickenError),
  );
});

describe('toThickenError', () => {
  test('of a failure whose clean-up failed too is the failure', async () => {
    const failure = usageError('what failed', 'do something');
    const run = async () => {
      await using _held = { [Symbol.asyncDispose]: () => Promise.reject(new Error('clean-up')) };
      throw failure;
    };
    expect(toThickenError(await run().catch((error: unknown) => error))).toBe(failure);
  });

  test('gives its own errors back', () => {
    const error = errors.cancelled(PATH);
    expect(toThickenError(error)).toBe(error);
  });

  test.each([[new TypeError('x is not a function')], ['text'], [undefined], [null], [5]])(
    'calls %o INTERNAL, and keeps it as cause',
    (value) => {
      const error = toThickenError(value);
      expect(error.code).toBe('INTERNAL');
      expect(error.message).toMatch(/; .*report it$/);
      if (value !== undefined) expect(error.cause).toBe(value);
    },
  );
});

test('details that are added later are seen, and undefined ones are not', () => {
  const error = withDetails(errors.cancelled(PATH), { length: 5, offset: undefined });
  expect(error.length).toBe(5);
  expect('offset' in error).toBe(false);
});
