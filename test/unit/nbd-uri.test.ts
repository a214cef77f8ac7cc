import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { describeEndpoint, isNbdUri, parseNbdUri } from '../../lib/nbd/uri.js';

describe('an NBD URI', () => {
  test.each([
    ['nbd://host', { host: 'host', port: 10809 }, ''],
    ['nbd://host/', { host: 'host', port: 10809 }, ''],
    ['nbd:///name', { host: 'localhost', port: 10809 }, 'name'],
    ['nbd://host:1/name', { host: 'host', port: 1 }, 'name'],
    ['nbd://host:/name', { host: 'host', port: 10809 }, 'name'],
    ['NBD://host/a/../b//c', { host: 'host', port: 10809 }, 'a/../b//c'],
    ['nbd://[::1]:65535/x', { host: '::1', port: 65535 }, 'x'],
    ['nbd://[fe80::1%25eth0]/x', { host: 'fe80::1%eth0', port: 10809 }, 'x'],
    ['nbd://10.0.0.1/%C3%BC%20%2F%23%3f', { host: '10.0.0.1', port: 10809 }, 'ü /#?'],
    ['nbd+unix:///?socket=/run/s', { socketPath: '/run/s' }, ''],
    ['nbd+unix:///disk?socket=/run/a%20b%26c', { socketPath: '/run/a b&c' }, 'disk'],
    ['nbd+unix://?socket=s', { socketPath: 's' }, ''],
  ])('%s', (text, endpoint, exportName) => {
    expect(parseNbdUri(text)).toEqual({ endpoint, exportName, tls: false });
    expect(isNbdUri(text)).toBe(true);
  });

  test('may ask for TLS, and say with what', () => {
    expect(parseNbdUri('nbds://host/x')).toMatchObject({ tls: true, exportName: 'x' });
    const full = 'nbds+unix:///x?tls-certificates=/etc/pki&socket=/s&tls-hostname=a.example';
    expect(parseNbdUri(full)).toEqual({
      endpoint: { socketPath: '/s' },
      exportName: 'x',
      tls: true,
      tlsHostname: 'a.example',
      tlsCertificates: '/etc/pki',
    });
  });

  test.each([
    '', 'nbd', 'nbd:', 'nbd:host', 'nbd:/host', 'http://host', 'nbd+vsock://2', 'nbdx://host', 'nbd+unix:/s',
    'nbd://host:0', 'nbd://host:65536', 'nbd://host:-1', 'nbd://host:1x', 'nbd://::1', 'nbd://[::1', 'nbd://[host]', 'nbd://[]', 'nbd://[::1]x',
    'nbd://user@host', 'nbd://host/%', 'nbd://host/%zz', 'nbd://host/%ff', 'nbd://host/a%00b', 'nbd://host/x#y', 'nbd://ho st/x', 'nbd://a%0Ab/',
    'nbd://host/?socket=/s', 'nbd://host/?x=y', 'nbd+unix:///x', 'nbd+unix:///x?socket=', 'nbd+unix:///x?socket', 'nbd+unix://host/x?socket=/s',
    'nbd+unix:///?socket=/a&socket=/b', `nbd+unix:///?socket=/${'x'.repeat(107)}`, `nbd://host/${'x'.repeat(4097)}`,
    'nbd+unix:///?socket=%00abstract', 'nbd://host/?tls-hostname=x', 'nbd+unix:///?socket=/s&tls-certificates=/p',
  ])('%j is none', (text) => {
    expect(() => parseNbdUri(text)).toThrow(expect.objectContaining({ code: 'USAGE' }));
  });

  test('of any name and socket is read as it was written', () => {
    const names = fc.string({ unit: 'grapheme', maxLength: 100 }).filter((s) => !/\p{Cs}/u.test(s) && !s.includes('\0'));
    fc.assert(
      fc.property(names, names.filter((s) => s !== '' && Buffer.byteLength(s) <= 107), (exportName, socketPath) => {
        const text = `nbd+unix:///${encodeURIComponent(exportName)}?socket=${encodeURIComponent(socketPath)}`;
        expect(parseNbdUri(text)).toEqual({ endpoint: { socketPath }, exportName, tls: false });
      }),
    );
  });

  test('or whatever it is gives a URI or an error of ours, in one bounded line', () => {
    const texts = fc.oneof(fc.string({ unit: 'binary' }), fc.string().map((s) => `nbd://${s}`), fc.string().map((s) => `nbd+unix:///${s}`));
    fc.assert(
      fc.property(texts, (text) => {
        try {
          parseNbdUri(text);
        } catch (error) {
          expect(error).toBeInstanceOf(ThickenError);
          expect((error as ThickenError).code).toBe('USAGE');
          expect((error as ThickenError).message).not.toMatch(/[\p{Cc}]/u);
        }
      }),
      { numRuns: 1000 },
    );
  });
});

test.each([
  [{ host: 'h', port: 5 }, 'nbd://h:5'],
  [{ host: '::1', port: 5 }, 'nbd://[::1]:5'],
  [{ socketPath: '/s' }, 'nbd+unix://?socket=/s'],
])('%o is named %s', (endpoint, name) => {
  expect(describeEndpoint(endpoint)).toBe(name);
});
