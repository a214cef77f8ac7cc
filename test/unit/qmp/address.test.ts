import { expect, test } from 'vitest';
import { parseAddress } from '../../../lib/qmp/transport.js';

const unix = (path: string) => ({ kind: 'unix', path });
const tcp = (host: string, port: number) => ({ kind: 'tcp', host, port });

test.each([
  ['unix:/run/qmp.sock', unix('/run/qmp.sock')],
  ['unix:qmp.sock', unix('qmp.sock')],
  ['/run/qmp.sock', unix('/run/qmp.sock')],
  ['./qmp.sock', unix('./qmp.sock')],
  ['/run/with:4444', unix('/run/with:4444')],
  ['unix:localhost:4444', unix('localhost:4444')],
  [`/${'a'.repeat(106)}`, unix(`/${'a'.repeat(106)}`)],
  ['tcp:localhost:4444', tcp('localhost', 4444)],
  ['localhost:4444', tcp('localhost', 4444)],
  ['127.0.0.1:1', tcp('127.0.0.1', 1)],
  ['[::1]:65535', tcp('::1', 65_535)],
  ['tcp:[fe80::1%eth0]:4444', tcp('fe80::1%eth0', 4444)],
])('%s', (text, expected) => {
  expect(parseAddress(text)).toEqual(expected);
});

test.each([
  '',
  'qmp.sock',
  'unix:',
  'tcp:localhost',
  'localhost:0',
  'localhost:65536',
  'localhost:',
  'localhost:http',
  ':4444',
  '::1:4444',
  'tcp:a b:1',
  '/run/\0evil',
  // Node would connect to the first 107 bytes.
  `/${'a'.repeat(107)}`,
  `/${'ä'.repeat(54)}`,
])('%j is no address', (text) => {
  expect(() => parseAddress(text)).toThrow(expect.objectContaining({ code: 'USAGE' }));
});
