import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { readMessage } from '../../../lib/qmp/message.js';
import { WireError, type JsonObject } from '../../../lib/qmp/wire.js';

const read = (value: JsonObject, bytes = 100) => readMessage(value, bytes);

describe('readMessage', () => {
  test('reads a greeting, with and without capabilities', () => {
    expect(read({ QMP: { version: {}, capabilities: ['oob', 1] } })).toEqual({ kind: 'greeting', capabilities: ['oob'] });
    expect(read({ QMP: { version: {} } })).toEqual({ kind: 'greeting', capabilities: [] });
  });

  test('reads events; a clock that failed is null', () => {
    const timestamp = { seconds: 5, microseconds: 250_000 };
    expect(read({ event: 'STOP', timestamp })).toEqual({ kind: 'event', event: { name: 'STOP', data: {}, timestamp: 5250 } });
    const failed = read({ event: 'STOP', data: { a: 1 }, timestamp: { seconds: -1, microseconds: -1 } });
    expect(failed).toEqual({ kind: 'event', event: { name: 'STOP', data: { a: 1 }, timestamp: null } });
    expect(read({ event: 'STOP' })).toMatchObject({ event: { timestamp: null } });
  });

  test('reads replies', () => {
    expect(read({ return: [], id: 3 })).toEqual({ kind: 'return', id: 3, value: [] });
    expect(read({ error: { class: 'GenericError', desc: 'no' }, id: 4 })).toEqual({
      kind: 'error',
      id: 4,
      qmpClass: 'GenericError',
      desc: 'no',
    });
  });

  test.each<[string, JsonObject]>([
    ['return and error', { return: {}, error: { class: 'a', desc: 'b' }, id: 1 }],
    ['return and event', { return: {}, event: 'STOP', id: 1 }],
    ['greeting and event', { QMP: {}, event: 'STOP' }],
    ['nothing known', { id: 1 }],
    ['a return without id', { return: {} }],
    ['an id of another kind', { return: {}, id: '1' }],
    ['an error about what was sent', { error: { class: 'GenericError', desc: 'JSON parse error' } }],
    ['an error of words alone', { error: 'no', id: 1 }],
    ['an error without class', { error: { desc: 'no' }, id: 1 }],
    ['an event without name', { event: 1 }],
    ['an event whose data is a list', { event: 'STOP', data: [] }],
    ['a greeting that is a word', { QMP: 'hello' }],
    ['capabilities that are no list', { QMP: { capabilities: 'oob' } }],
  ])('refuses %s', (_, value) => {
    expect(() => read(value)).toThrow(WireError);
  });

  test('refuses a huge event, and no other huge message', () => {
    expect(() => read({ event: 'STOP' }, 2 ** 20)).toThrow(/event of 1048576 bytes/);
    expect(read({ return: {}, id: 1 }, 2 ** 20)).toMatchObject({ kind: 'return' });
  });

  test('reads or refuses whatever JSON there is', () => {
    const key = fc.constantFrom('QMP', 'event', 'return', 'error', 'id', 'data', 'timestamp', 'other');
    fc.assert(
      fc.property(fc.dictionary(key, fc.jsonValue()), (value) => {
        try {
          expect(['greeting', 'event', 'return', 'error']).toContain(read(value).kind);
        } catch (error) {
          expect(error).toBeInstanceOf(WireError);
        }
      }),
    );
  });
});
