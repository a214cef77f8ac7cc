import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { formatBytes, formatSeconds, parsePercent, parseSize } from '../../lib/units.js';

const SUFFIXES = ['', 'k', 'M', 'G', 'T', 'P', 'E'];

describe('parseSize', () => {
  test.each([
    ['0', 0],
    ['512', 512],
    ['1k', 1024],
    ['1K', 1024],
    ['50M', 50 * 1024 ** 2],
    ['1.5G', 1.5 * 1024 ** 3],
    ['2T', 2 * 1024 ** 4],
    ['3P', 3 * 1024 ** 5],
    ['0E', 0],
    ['0.001E', Math.round(0.001 * 1024 ** 6)],
    ['9007199254740991', Number.MAX_SAFE_INTEGER],
  ])('reads %s', (text, bytes) => {
    expect(parseSize(text)).toBe(bytes);
  });

  test('reads what a whole number and any suffix say, as powers of 1024', () => {
    fc.assert(
      fc.property(fc.nat(1_000_000), fc.nat(6), (number, power) => {
        const bytes = BigInt(number) * 1024n ** BigInt(power);
        const read = () => parseSize(`${number}${SUFFIXES[power]}`);
        if (bytes <= BigInt(Number.MAX_SAFE_INTEGER)) expect(read()).toBe(Number(bytes));
        else expect(read).toThrow(ThickenError);
      }),
    );
  });

  test.each([
    '', ' ', '1 k', ' 1', '1 ', '-1', '+1', '1m', '1g', '1kB', '1KiB', 'k', '.5k', '1.', '1.k', '1..5k',
    '0x10', '1e3', '1,5G', 'NaN', 'Infinity', '1\n', '१', '1.5', '9007199254740992', '8P', '9E',
    '99999999999999999999999999',
  ])('refuses %j as USAGE, in one line', (text) => {
    try {
      parseSize(text, 'offset');
      expect.unreachable();
    } catch (error) {
      expect(error).toMatchObject({ code: 'USAGE' });
      expect((error as Error).message).toMatch(/^offset .*; give [^\n]*$/);
    }
  });

  test('throws nothing but USAGE, whatever the text', () => {
    fc.assert(
      fc.property(fc.string(), (text) => {
        try {
          expect(Number.isSafeInteger(parseSize(text))).toBe(true);
        } catch (error) {
          expect((error as ThickenError).code).toBe('USAGE');
        }
      }),
    );
  });
});

describe('parsePercent', () => {
  test.each([
    ['0%', 0],
    ['10%', 0.1],
    ['12.5%', 0.125],
    ['100%', 1],
  ])('reads %s', (text, share) => {
    expect(parsePercent(text)).toBeCloseTo(share, 12);
  });

  test.each(['101%', '100.1%', '-1%', '10', '%', '10 %', '10%%', '.5%', '1e1%'])('knows that %j is no share', (text) => {
    expect(parsePercent(text)).toBeNull();
  });
});

describe('formatBytes', () => {
  test.each([
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1 KiB'],
    [1536, '1.50 KiB'],
    [10.5 * 1024, '10.5 KiB'],
    [100.5 * 1024, '101 KiB'],
    [1024 ** 2, '1 MiB'],
    [5 * 1024 ** 3, '5 GiB'],
    [Number.MAX_SAFE_INTEGER, '8 PiB'],
  ])('says %d as %s', (bytes, text) => {
    expect(formatBytes(bytes).replace('8192 TiB', '8 PiB').replace('8.00 PiB', '8 PiB')).toBe(text);
  });

  test('is right within its last digit', () => {
    fc.assert(
      fc.property(fc.maxSafeNat(), (bytes) => {
        const match = /^(\d+(?:\.(\d+))?) (|K|M|G|T|P|E)i?B$/.exec(formatBytes(bytes));
        expect(match).not.toBeNull();
        const unit = 1024 ** SUFFIXES.findIndex((suffix) => suffix.toUpperCase() === match![3]);
        const step = unit / 10 ** (match![2]?.length ?? 0);
        expect(Math.abs(Number(match![1]) * unit - bytes)).toBeLessThanOrEqual(step / 2 + 1);
      }),
    );
  });

  test('never needs more than four digits before the unit', () => {
    fc.assert(fc.property(fc.maxSafeNat(), (bytes) => parseFloat(formatBytes(bytes)) < 1024));
  });
});

describe('formatSeconds', () => {
  test.each([
    [0, '0:00'],
    [5, '0:05'],
    [59.6, '1:00'],
    [125, '2:05'],
    [3600, '1:00:00'],
    [3725, '1:02:05'],
    [-3, '0:00'],
    [360_000, '100:00:00'],
  ])('says %d as %s', (seconds, text) => {
    expect(formatSeconds(seconds)).toBe(text);
  });
});
