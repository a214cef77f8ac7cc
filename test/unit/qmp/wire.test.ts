import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { MOST_NESTING, ObjectDecoder, WireError, type JsonObject } from '../../../lib/qmp/wire.js';

const encode = (text: string) => new TextEncoder().encode(text);

/** What a decoder makes of the bytes, cut at `cuts`. */
function decode(bytes: Uint8Array, cuts: readonly number[] = [], decoder = new ObjectDecoder()): JsonObject[] {
  const values: JsonObject[] = [];
  const places = [0, ...cuts.map((cut) => cut % (bytes.length + 1)).sort((a, b) => a - b), bytes.length];
  for (let i = 1; i < places.length; i++) {
    decoder.push(bytes.subarray(places[i - 1], places[i]), (value) => values.push(value));
  }
  return values;
}

const message = fc.dictionary(fc.string({ unit: 'binary' }), fc.jsonValue());
const cuts = fc.array(fc.nat(), { maxLength: 20 });
const asJson = (value: unknown) => JSON.parse(JSON.stringify(value)) as JsonObject;

describe('ObjectDecoder', () => {
  test('gives every message, wherever the stream is cut, and however it is laid out', () => {
    const layout = fc.constantFrom(undefined, 2, '\t');
    const gap = fc.constantFrom('', '\n', '\r\n', ' \t\n');
    fc.assert(
      fc.property(fc.array(message, { maxLength: 8 }), layout, gap, cuts, (messages, indent, between, places) => {
        const text = messages.map((value) => JSON.stringify(value, null, indent) + between).join('');
        expect(decode(encode(text), places)).toEqual(messages.map(asJson));
      }),
    );
  });

  test('tells the size of a message, and whether one has begun', () => {
    const decoder = new ObjectDecoder();
    const sizes: number[] = [];
    decoder.push(encode(' {"a":"ä"} {"b"'), (_, bytes) => sizes.push(bytes));
    expect(sizes).toEqual([10]);
    expect(decoder.partial).toBe(true);
    decoder.push(encode(':1}'), (_, bytes) => sizes.push(bytes));
    expect(sizes).toEqual([10, 7]);
    expect(decoder.partial).toBe(false);
  });

  test.each([
    ['a human monitor', "QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) "],
    ['a list', '[]\n'],
    ['a number', '1\n'],
    ['a string', '"{}"\n'],
    ['null', 'null\n'],
    ['a stray brace', '}\n'],
    ['mismatched brackets', '{"a": [}}\n'],
    ['a word that JSON lacks', '{"a": undefined}\n'],
    ['no value', '{"a"}\n'],
    ['a line end in a string', '{"a": "x\ny"}\n'],
    ['a NUL', '\0{}\n'],
  ])('refuses %s', (_, text) => {
    expect(() => decode(encode(text))).toThrow(WireError);
  });

  test('refuses what is not UTF-8', () => {
    const bytes = Uint8Array.of(...encode('{"a":"'), 0xff, ...encode('"}'));
    expect(() => decode(bytes)).toThrow(WireError);
  });

  test('gives what came before the fault', () => {
    const values: JsonObject[] = [];
    expect(() => new ObjectDecoder().push(encode('{"a":1}{"b":2}x'), (value) => values.push(value))).toThrow(WireError);
    expect(values).toEqual([{ a: 1 }, { b: 2 }]);
  });

  test('knows no more of bytes than JSON.parse does', () => {
    const noise = fc.array(fc.constantFrom('{', '}', '[', ']', '"', '\\', ':', ',', '1', 'a', ' ', '\n', 'ä'), {
      maxLength: 30,
    });
    fc.assert(
      fc.property(noise, cuts, (parts, places) => {
        const bytes = encode(parts.join(''));
        const attempt = () => decode(bytes, places);
        let values: JsonObject[];
        try {
          values = attempt();
        } catch (error) {
          expect(error).toBeInstanceOf(WireError);
          return;
        }
        for (const value of values) expect(asJson(value)).toEqual(value);
      }),
      { numRuns: 2000 },
    );
  });

  test('limits nesting before anything is parsed, outside of strings only', () => {
    const nested = (levels: number) => `{"a":${'['.repeat(levels - 1)}${']'.repeat(levels - 1)}}`;
    expect(decode(encode(nested(MOST_NESTING)))).toHaveLength(1);
    // Nothing is complete here: the limit does not wait for the end.
    expect(() => decode(encode(nested(MOST_NESTING + 1).slice(0, MOST_NESTING + 6)))).toThrow(/nested/);
    expect(decode(encode(`{"a":"${'[{'.repeat(5000)}\\"${'['.repeat(5000)}"}`))).toHaveLength(1);
  });

  test('limits the size, exactly, whether the message ends or not', () => {
    const limits = { bytes: 10_000, nesting: 10 };
    const text = `{"a":"${'x'.repeat(10_000 - 8)}"}`;
    expect(decode(encode(text), [1, 5000, 9999], new ObjectDecoder(limits))).toHaveLength(1);
    expect(() => decode(encode(text.replace('x', 'xx')), [1, 5000], new ObjectDecoder(limits))).toThrow(/10000 bytes/);
    const endless = new ObjectDecoder(limits);
    const feed = () => {
      for (let i = 0; i < 10; i++) endless.push(encode(i === 0 ? '{"' : 'x'.repeat(2000)), () => undefined);
    };
    expect(feed).toThrow(/10000 bytes/);
  });

  test('space between messages takes no memory', () => {
    const decoder = new ObjectDecoder({ bytes: 16, nesting: 2 });
    for (let i = 0; i < 1000; i++) decoder.push(encode(' \n'.repeat(100)), () => undefined);
    expect(decode(encode('{"a":1}'), [], decoder)).toEqual([{ a: 1 }]);
  });

  test('a key named __proto__ is just a key', () => {
    const [value] = decode(encode('{"__proto__":{"polluted":true}}'));
    expect(Object.keys(value!)).toEqual(['__proto__']);
    expect(({} as JsonObject)['polluted']).toBeUndefined();
  });
});
