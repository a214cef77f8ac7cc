import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { placeOf } from '../../lib/chain/name.js';

const file = (path: string) => ({ kind: 'file', path });

describe('the name of a backing file', () => {
  test.each([
    ['/images/base.raw', '/vm/disk.qcow2', '/images/base.raw'],
    ['base.raw', '/vm/disk.qcow2', '/vm/base.raw'],
    ['../base.raw', '/vm/a/disk.qcow2', '/vm/a/../base.raw'],
    ['base.raw', 'disk.qcow2', 'base.raw'],
    ['./a:b.raw', '/vm/disk.qcow2', '/vm/./a:b.raw'],
    ['file:/images/base.raw', '/vm/disk.qcow2', '/images/base.raw'],
  ])('%j of %j is the file %j', (name, image, path) => {
    expect(placeOf(name, image)).toEqual(file(path));
  });

  test.each([
    ['nbd://host/export', { host: 'host', port: 10809 }, 'export'],
    ['nbd+tcp://host:99/', { host: 'host', port: 99 }, ''],
    ['nbd+unix:///e?socket=/run/s', { socketPath: '/run/s' }, 'e'],
    ['nbd:unix:/run/s', { socketPath: '/run/s' }, ''],
    ['nbd:unix:/run/s:exportname=a/b', { socketPath: '/run/s' }, 'a/b'],
    ['nbd:host:99:exportname=x', { host: 'host', port: 99 }, 'x'],
    ['nbd:[::1]:99', { host: '::1', port: 99 }, ''],
  ])('%j is a server', (name, endpoint, exportName) => {
    expect(placeOf(name, '/vm/disk.qcow2')).toMatchObject({ kind: 'nbd', uri: { endpoint, exportName, tls: false } });
  });

  test.each(['nbds://host/x', 'nbds+unix:///x?socket=/run/s', 'nbds://10.0.0.1/?tls-hostname=host'])('%j is a server, by TLS', (name) => {
    expect(placeOf(name, '/vm/disk.qcow2')).toMatchObject({ kind: 'nbd', uri: { tls: true } });
  });

  test.each([
    ['', /empty/],
    ['json:{}', /json:/],
    ['file:base.raw', /protocol file/],
    ['ssh://host/x', /protocol ssh/],
    ['base.raw:snapshot', /protocol base.raw/],
    ['fat:rw:/etc', /protocol fat/],
    ['nbds://host/x?tls-certificates=/pki', /--tls-certificates/],
    ['nbd:host', /no address/],
    ['nbd:unix:', /no address/],
    ['a\nb', /not to be seen/],
    ['a\u200bb', /not to be seen/],
    ['x'.repeat(5000), /too long/],
  ])('%j is refused', (name, why) => {
    expect(() => placeOf(name, '/vm/disk.qcow2')).toThrow(why);
    expect(() => placeOf(name, '/vm/disk.qcow2')).toThrow(expect.objectContaining({ code: 'BACKING_REFUSED' }));
  });

  test('is a file, a server, or refused, whatever it is; and its error is one line', () => {
    fc.assert(
      fc.property(fc.string({ unit: 'binary', maxLength: 60 }), (name) => {
        try {
          expect(['file', 'nbd']).toContain(placeOf(name, '/vm/disk.qcow2').kind);
        } catch (error) {
          expect(error).toMatchObject({ code: 'BACKING_REFUSED' });
          expect((error as Error).message).not.toMatch(/[\n\r]/);
        }
      }),
    );
  });
});
