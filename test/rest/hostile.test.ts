/** What images say of other files, and what of that is believed. */
import { openSync, closeSync, readFileSync, writeFileSync, writeSync } from 'node:fs';
import { basename, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { scratch, scratchPath } from '../support/scratch.js';
import { cliMain, mustRun, repository, run } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { type Refusal } from '../storage/helpers.js';
import { withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['strace'] });

/** Files of the machine that every process opens. */
const USUAL = /^(\/etc\/(ld\.so|ssl|localtime)|\/usr\/|\/lib|\/proc\/|\/sys\/|\/dev\/(null|urandom)$)/;

interface Traced {
  status: number | null;
  stderr: string;
  document: Refusal;
  /** Names that were opened, of this program and all that it started. */
  opened: string[];
  connected: string[];
  started: string[];
}

/** Runs a command, and tells what it opened, connected to and started. */
async function traced(...args: string[]): Promise<Traced> {
  const log = scratchPath('strace');
  const calls = 'trace=open,openat,openat2,connect,execve,creat';
  const command = [process.execPath, cliMain, ...args, '--json'];
  const { status, stdout, stderr } = await run('strace', ['-f', '-qq', '-s', '4096', '-e', calls, '-o', log, ...command]);
  const lines = readFileSync(log, 'utf8').split('\n');
  const named = (pattern: RegExp) => lines.flatMap((line) => pattern.exec(line)?.[1] ?? []);
  expect(named(/ execve\("([^"]*)"/).length, 'strace saw nothing').toBeGreaterThan(0);
  return {
    status,
    stderr,
    document: JSON.parse(stdout) as Refusal,
    opened: named(/ open(?:at2?)?\((?:[^,"]*, )?"((?:[^"\\]|\\.)*)"/),
    connected: named(/ connect\((.*)/),
    started: named(/ execve\("([^"]*)"/).slice(1),
  };
}

/** A qcow2 header of version 3 in a file of some size, naming a backing file. */
function writeHeader(path: string, backing: string, format: string | null, size = 1 << 20): string {
  const header = Buffer.alloc(65_536);
  header.write('QFI\xfb', 0, 'latin1');
  const name = Buffer.from(backing, 'utf8');
  const extension = format === null ? Buffer.alloc(0) : extensionOf(0xe2792aca, Buffer.from(format));
  header.writeUInt32BE(3, 4);
  header.writeBigUInt64BE(BigInt(104 + extension.length + 8), 8);
  header.writeUInt32BE(name.length, 16);
  header.writeUInt32BE(16, 20);
  header.writeBigUInt64BE(BigInt(size), 24);
  header.writeUInt32BE(1, 36);
  header.writeBigUInt64BE(3n * 65_536n, 40);
  header.writeBigUInt64BE(65_536n, 48);
  header.writeUInt32BE(1, 56);
  header.writeUInt32BE(4, 96);
  header.writeUInt32BE(104, 100);
  extension.copy(header, 104);
  name.copy(header, 104 + extension.length + 8);
  const image = Buffer.alloc(4 * 65_536);
  header.copy(image);
  image.writeBigUInt64BE(2n * 65_536n, 65_536);
  for (let i = 0; i < 4; i++) image.writeUInt16BE(1, 2 * 65_536 + 2 * i);
  writeFileSync(path, image);
  return path;
}

function extensionOf(type: number, data: Buffer): Buffer {
  const padded = Buffer.alloc(8 + Math.ceil(data.length / 8) * 8);
  padded.writeUInt32BE(type, 0);
  padded.writeUInt32BE(data.length, 4);
  data.copy(padded, 8);
  return padded;
}

const COMMANDS = [['info'], ['map'], ['verify'], ['allocate', '--dry-run'], ['allocate'], ['allocate', '--drop-backing']];

/** Nothing but the image was opened, nothing asked over a socket, nothing started. */
function expectUntouched({ opened, connected, started }: Traced, image: string, what: string): void {
  const ours = (name: string) => name.startsWith(`${repository}/`);
  const foreign = (name: string) => !USUAL.test(name) && !ours(name) && name !== image;
  const others = opened.filter(foreign);
  expect(others, what).toEqual([]);
  expect(opened, what).toContain(image);
  expect(opened.filter((name) => !ours(name) && /passwd|shadow|secret/.test(name)), what).toEqual([]);
  expect(connected, what).toEqual([]);
  expect(started.filter((name) => !name.endsWith('/node')), what).toEqual([]);
}

const NAMES = [
  ['an absolute path', '/etc/passwd'],
  ['a path that leads up', '../../../../etc/passwd'],
  ['control characters', '../\u001b[2J\nsecret'],
  ['json:', 'json:{"driver":"file","filename":"/etc/passwd"}'],
  ['an NBD server', 'nbd://127.0.0.1:10809/secret'],
  ['an NBD socket', 'nbd+unix:///secret?socket=/run/secret.sock'],
  ['ssh', 'ssh://somebody@somewhere/secret'],
  ['http', 'http://127.0.0.1/secret'],
] as const;

describe.runIf(runnable)('a raw disk in which a guest has written a qcow2 header', () => {
  it.each(NAMES)('with %s below: nothing of it is opened without the caller’s word', async (_what, name) => {
    const image = writeHeader(scratchPath('disk.img'), name, 'raw');
    for (const command of COMMANDS) {
      const result = await traced(...command, image);
      expectUntouched(result, image, command.join(' '));
      expect(result.stderr).not.toContain('\u001b');
      expect(result.stderr).not.toContain('defect');
      if (command[0] === 'info' || command[0] === 'map') expect(result.status, result.stderr).toBe(0);
      else expect(result.document.error ?? result.document, command.join(' ')).toMatchObject({ code: 'FORMAT_REQUIRED' });
    }
  }, 300_000);

  it('that is said to be raw is raw', async () => {
    const image = writeHeader(scratchPath('disk.img'), '/etc/passwd', 'raw');
    const result = await traced('allocate', image, '--format', 'raw');
    expect(result.status, result.stderr).toBe(0);
    expectUntouched(result, image, 'allocate');
  });

  it('that is named .qcow2 is not believed as to what lies below, either', async () => {
    const image = writeHeader(scratchPath('disk.qcow2'), '/etc/passwd', 'raw');
    for (const command of COMMANDS) expectUntouched(await traced(...command, image), image, command.join(' '));
  });
});

/** With the caller's word for the image itself. */
async function refusalOf(image: string, ...more: string[]): Promise<Traced & { code: string; message: string }> {
  const result = await traced('allocate', image, '--format', 'qcow2', ...more);
  expect(result.status, result.stderr).not.toBe(0);
  expect(result.stderr.trimEnd().split('\n')).toHaveLength(1);
  return { ...result, ...result.document.error };
}

describe.runIf(runnable)('what an image names that the caller trusts', () => {
  it.each([
    ['json:', 'json:{"driver":"file","filename":"/etc/passwd"}', 'BACKING_REFUSED', /json: name/],
    ['another protocol', 'ssh://somewhere/secret', 'BACKING_REFUSED', /protocol ssh/],
    ['http', 'http://127.0.0.1/secret', 'BACKING_REFUSED', /protocol http/],
    ['fd sets', 'fd:3', 'BACKING_REFUSED', /protocol fd/],
    ['control characters', '../\u001b[2J\nsecret', 'BACKING_REFUSED', /characters that are not to be seen/],
    ['characters that turn the text around', 'a\u202esecret', 'BACKING_REFUSED', /not to be seen/],
    ['TLS without what it takes', 'nbds://127.0.0.1/secret', 'BACKING_REFUSED', /TLS/],
    ['an NBD address that is none', 'nbd:127.0.0.1', 'BACKING_REFUSED', /no address/],
    ['a folder', '.', 'BACKING_REFUSED', /neither a file nor a block device/],
    ['a device that is no disk', '/dev/zero', 'BACKING_REFUSED', /neither a file nor a block device/],
    ['what is not there', 'gone.raw', 'BACKING_MISSING', /ENOENT/],
  ])('%s: it is refused, and not opened', async (_what, name, code, why) => {
    const image = writeHeader(scratchPath('disk.qcow2'), name, 'raw');
    const refused = await refusalOf(image);
    expect(refused.code).toBe(code);
    expect(refused.message).toMatch(why);
    expectUntouched(refused, image, name);
  });

  it.each([null, 'qcow', 'luks', 'nfs', 'raw\u001b'])('format %j is refused', async (format) => {
    const below = scratchPath('below');
    writeFileSync(below, Buffer.alloc(65_536));
    const image = writeHeader(scratchPath('disk.qcow2'), basename(below), format);
    const refused = await refusalOf(image);
    expect(refused.code).toBe(format === null ? 'BACKING_FORMAT' : 'UNSUPPORTED');
    expect(refused.message).not.toContain('\u001b');
    expectUntouched(refused, image, String(format));
  });

  it('a loop is found before anything is opened twice', async () => {
    const own = writeHeader(scratchPath('own.qcow2'), 'own.qcow2', 'qcow2');
    writeHeader(own, basename(own), 'qcow2');
    const refused = await refusalOf(own);
    expect(refused.code).toBe('BACKING_LOOP');
    expectUntouched(refused, own, 'loop of one');

    const [a, b] = [scratchPath('a.qcow2'), scratchPath('b.qcow2')];
    writeHeader(a, basename(b), 'qcow2');
    writeHeader(b, join('..', basename(scratch()), basename(a)), 'qcow2');
    const other = await refusalOf(a);
    expect(other.code).toBe('BACKING_LOOP');
    expect(other.started.filter((name) => !name.endsWith('/node'))).toEqual([]);
    expect(other.opened.filter((name) => name.startsWith(scratch()))).toEqual([a, b]);
  });

  it('a thousand layers are too many; two hundred are not', async () => {
    const layers = Array.from({ length: 1000 }, () => scratchPath('l.qcow2'));
    layers.forEach((path, i) => writeHeader(path, basename(layers[i + 1] ?? layers[i]!), 'qcow2'));
    const refused = await refusalOf(layers[0]!);
    expect(refused.code).toBe('BACKING_DEPTH');
    expect(refused.started.filter((name) => !name.endsWith('/node'))).toEqual([]);

    const base = scratchPath('base.raw');
    writeFileSync(base, Buffer.alloc(1 << 20, 7));
    writeHeader(layers[199]!, basename(base), 'raw');
    await mustRun(process.execPath, [cliMain, 'allocate', layers[0]!, '--format', 'qcow2', '--drop-backing']);
    const { stdout } = await run('qemu-img', ['compare', '-f', 'qcow2', '-F', 'raw', layers[0]!, base]);
    expect(stdout).toMatch(/identical/);
  }, 300_000);

  it('is given to the daemon as it was opened here, not by its name', async () => {
    const below = scratchPath('below.raw');
    writeFileSync(below, Buffer.alloc(1 << 20, 1));
    const image = writeHeader(scratchPath('disk.qcow2'), basename(below), 'raw');
    const result = await traced('allocate', image, '--format', 'qcow2', '--preallocation', 'metadata');
    expect(result.status, result.stderr).toBe(0);
    // The daemon is given what is open here: it never sees the name.
    const byName = result.opened.filter((name) => name === below);
    expect(byName.length).toBeGreaterThan(0);
    expect(result.opened.filter((name) => name.startsWith('/proc/') && name.includes('/fd/')).length).toBeGreaterThan(0);
  });
});

describe.runIf(runnable)('a header that is broken', () => {
  const cases: [string, (header: Buffer) => void][] = [
    ['a name outside', (header) => header.writeBigUInt64BE(1n << 40n, 8)],
    ['a name that is too long', (header) => header.writeUInt32BE(1024, 16)],
    ['a name with a NUL', (header) => header.writeUInt8(0, 104 + 16 + 8 + 2)],
    ['an extension that reaches outside', (header) => header.writeUInt32BE(1 << 30, 108)],
    ['clusters of a size that is none', (header) => header.writeUInt32BE(40, 20)],
  ];
  it.each(cases)('%s: nothing is opened', async (_what, damage) => {
    const image = writeHeader(scratchPath('disk.qcow2'), '/etc/passwd', 'raw');
    const header = readFileSync(image).subarray(0, 512);
    damage(header);
    const fd = openSync(image, 'r+');
    writeSync(fd, header, 0, 512, 0);
    closeSync(fd);
    const refused = await refusalOf(image);
    expect(refused.code).toMatch(/^(DAMAGED|UNSUPPORTED|QCOW2_|NOT_QCOW2)/);
    expectUntouched(refused, image, _what);
  });
});
