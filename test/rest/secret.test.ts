/** Encrypted qcow2 images over others: their key, and who gets to see it. */
import { readdirSync, readFileSync, statSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { open, QmpClient } from '../../lib/index.js';
import { readSecret, Secret } from '../../lib/secret.js';
import type { AllocationResult, ImageInfo, MapEntry } from '../../lib/types.js';
import { qemuNbd, serveFile } from '../nbd/servers.js';
import { cliJson, expectContract, expectOneLine, KiB, MiB, type Refusal } from '../storage/helpers.js';
import type { QemuExtent } from '../support/judges.js';
import { cli, cliMain, mustRun, run, spawnCli } from '../support/processes.js';
import { createEncrypted, qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { daemonsIn, expectNothingLeft, processesWith, withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['nbdkit', 'sha256sum'] });
const SIZE = 24 * MiB;
/** With what a terminal, a shell, JSON, and who strips newlines would make another of. */
const PASSPHRASE = 'kæy "of\\ the $tests\n';

interface Key {
  file: string;
  /** For QEMU's tools. */
  object: string[];
}

function makeKey(passphrase = PASSPHRASE): Key {
  const file = scratchPath('passphrase');
  writeFileSync(file, passphrase);
  return { file, object: ['--object', `secret,id=s,file=${file}`] };
}

/** As --image-opts names it; `below`: how the layer below is to be opened where that needs a key, too. */
const named = (path: string, below = '') => `driver=qcow2,encrypt.key-secret=s,file.filename=${path}${below}`;

async function makeBase(): Promise<string> {
  const path = scratchPath('base.raw');
  await mustRun('qemu-img', ['create', '-q', '-f', 'raw', path, String(SIZE)]);
  await qemuIo(path, 'raw', 'write -q -P 5 1M 3M', 'write -q -P 6 9000k 5k', 'write -q -P 7 12M 6M');
  return path;
}

interface Disk {
  path: string;
  key: Key;
  expected: string;
  below: string[];
  release(): Promise<void>;
}

/** The files of what is below, its name and format for an overlay, how QEMU's tools open it, and its end. */
type Below = Pick<Disk, 'below' | 'release'> & { name: string; format: string; opened?: string };

const stays = () => Promise.resolve();

const BELOWS: Record<string, (key: Key) => Promise<Below>> = {
  raw: async () => {
    const base = await makeBase();
    return { name: base, format: 'raw', below: [base], release: stays };
  },
  qcow2: async () => {
    const base = await makeBase();
    const middle = scratchPath('middle.qcow2');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', middle]);
    await qemuIo(middle, 'qcow2', 'write -q -P 9 3M 300k', 'write -q -z 12M 1M');
    return { name: middle, format: 'qcow2', below: [base, middle], release: stays };
  },
  'a server': async () => {
    const base = await makeBase();
    const server = await serveFile(base);
    return { name: server.uri, format: 'raw', below: [base], release: () => server.process.dispose() };
  },
  'another encrypted one': async (key) => {
    const base = await makeBase();
    const path = await makeOverlay({ name: base, format: 'raw' }, key);
    await writeTo(path, key, '', 'write -q -P 11 5M 200k');
    const opened = `,backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=${path}`;
    return { name: path, format: 'qcow2', below: [base, path], release: stays, opened };
  },
};

async function makeOverlay({ name, format }: Pick<Below, 'name' | 'format'>, { object }: Key): Promise<string> {
  const path = scratchPath('image.qcow2');
  const options = 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10';
  await createEncrypted('-f', 'qcow2', ...object, '-u', '-b', name, '-F', format, '-o', options, path, String(SIZE));
  return path;
}

async function writeTo(path: string, { object }: Key, opened: string, ...writes: string[]): Promise<void> {
  const commands = writes.flatMap((write) => ['-c', write]);
  await mustRun('qemu-io', [...object, ...commands, '--image-opts', named(path, opened)]);
}

async function makeDisk(kind: string): Promise<Disk> {
  const key = makeKey();
  const { opened = '', ...below } = await BELOWS[kind]!(key);
  const path = await makeOverlay(below, key);
  await writeTo(path, key, opened, 'write -q -P 99 2M 100k', 'write -q -z 14M 128k');
  const expected = scratchPath('expected.raw');
  await mustRun('qemu-img', ['convert', ...key.object, '--image-opts', '-O', 'raw', named(path, opened), expected]);
  return { path, key, expected, below: below.below, release: below.release };
}

/** The image is sound, and reads as it did; `alone`: without what it lay on. */
async function expectSame({ path, key: { object }, expected }: Disk, below = ''): Promise<void> {
  const check = await run('qemu-img', ['check', ...object, '--image-opts', named(path, below)]);
  expect(check.status, check.stdout + check.stderr).toBe(0);
  const raw = `driver=raw,file.filename=${expected}`;
  const compared = await run('qemu-img', ['compare', ...object, '--image-opts', named(path, below), raw]);
  expect(compared.status, compared.stdout + compared.stderr).toBe(0);
}

async function mapByQemu({ path, key: { object } }: Disk, below = ''): Promise<QemuExtent[]> {
  const words = ['map', '--output=json', ...object, '--image-opts', named(path, below)];
  return JSON.parse(await mustRun('qemu-img', words)) as QemuExtent[];
}

const sumsOf = (files: string[]) => mustRun('sha256sum', files);

async function allocate({ path, key }: Disk, ...more: string[]): Promise<AllocationResult> {
  const words = ['allocate', path, '--format', 'qcow2', '--secret', `file=${key.file}`];
  const { status, stderr, document } = await cliJson<AllocationResult>([...words, ...more]);
  expect(status, stderr).toBe(0);
  expectContract(document);
  return document;
}

const LEVELS = ['metadata', 'falloc', 'full'] as const;

describe.runIf(runnable).each(Object.keys(BELOWS))('an encrypted image over %s', (kind) => {
  it.each(LEVELS)('is allocated by its key, and stands alone: %s', async (level) => {
    const disk = await makeDisk(kind);
    const sums = await sumsOf(disk.below);
    const result = await allocate(disk, '--preallocation', level, '--drop-backing');
    expect(result).toMatchObject({ verified: true, guarantee: level !== 'metadata', after: { allocated: SIZE } });
    expect(result.plan.map(({ route }) => route)).toEqual(expect.arrayContaining(['populate', 'stream']));
    expect(await sumsOf(disk.below)).toBe(sums);
    await disk.release();
    await mustRun('rm', disk.below);
    await expectSame(disk);
    for (const extent of await mapByQemu(disk)) expect(extent).toMatchObject({ depth: 0, present: true });
  });

  it.each(LEVELS)('is allocated in a range: %s', async (level) => {
    const disk = await makeDisk(kind);
    const sums = await sumsOf(disk.below);
    const [offset, length] = [3 * MiB + 5, 10 * MiB];
    const { effective } = await allocate(disk, '--preallocation', level, '--offset', String(offset), '--length', String(length));
    expect(await sumsOf(disk.below)).toBe(sums);
    const below = kind === 'another encrypted one'
      ? `,backing.driver=qcow2,backing.encrypt.key-secret=s,backing.file.filename=${disk.below.at(-1)}`
      : '';
    await expectSame(disk, below);
    const end = effective.offset + effective.length;
    const extents = await mapByQemu(disk, below);
    for (const extent of extents.filter(({ start, length: bytes }) => start < end && start + bytes > effective.offset)) {
      expect(extent).toMatchObject({ depth: 0, present: true });
    }
    expect(extents.some(({ depth }) => depth > 0)).toBe(true);
    await disk.release();
  });
});

describe.runIf(runnable)('the key of an image at rest', () => {
  it('may come by a descriptor, once for all targets', async () => {
    const [one, two] = [await makeDisk('raw'), await makeDisk('qcow2')];
    const words = [cliMain, 'allocate', one.path, two.path, '--format', 'qcow2', '--secret', 'fd=3', '--json'];
    const script = `exec 3< "$0"; cat <&3 | { exec 3<&0; exec "$@"; }`;
    const { status, stdout, stderr } = await run('sh', ['-c', script, one.key.file, process.execPath, ...words]);
    expect(status, stderr).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject([{ verified: true }, { verified: true }]);
    await expectSame(one);
    await expectSame(two);
  });

  it('may be given as bytes by a program, which wipes its own', async () => {
    const disk = await makeDisk('raw');
    const secret = new TextEncoder().encode(PASSPHRASE);
    await using image = await open(disk.path, { format: 'qcow2', secret });
    secret.fill(0);
    expect(await image.allocate().result).toMatchObject({ verified: true, guarantee: true });
    await expectSame(disk);
  });

  it('is not needed where nothing is copied, nor for a look', async () => {
    const disk = await makeDisk('qcow2');
    const words = [disk.path, '--format', 'qcow2'];
    const info = await cliJson<ImageInfo>(['info', ...words]);
    expect(info).toMatchObject({ status: 0, document: { virtualSize: SIZE, backing: [{ format: 'qcow2' }, { format: 'raw' }] } });
    const map = await cliJson<MapEntry[]>(['map', ...words]);
    expect(map.document.filter(({ depth }) => depth > 0).length).toBeGreaterThan(0);
    expect(map.document.some((entry) => 'offset' in entry && entry.depth === 0)).toBe(false);
    expect(await cliJson(['verify', ...words])).toMatchObject({ status: 3 });
    await allocate(disk);
    // All is there by now.
    expect(await cliJson(['allocate', ...words])).toMatchObject({ status: 0, document: { allocated: 0, verified: true } });
  });

  it('that is missing is asked for by the option’s name, before anything is changed', async () => {
    const disk = await makeDisk('raw');
    const before = await sumsOf([disk.path]);
    for (const more of [[], ['--dry-run'], ['--drop-backing'], ['--preallocation', 'metadata', '--length', '1M']]) {
      const refused = await cliJson<Refusal>(['allocate', disk.path, '--format', 'qcow2', ...more]);
      expect(refused).toMatchObject({ status: 2, document: { error: { code: 'SECRET_REQUIRED', path: disk.path } } });
      expect(refused.document.error.message).toContain('--secret file=PATH');
    }
    expect(await sumsOf([disk.path])).toBe(before);
  });

  it('that a layer below needs is asked for by that layer’s name', async () => {
    const disk = await makeDisk('another encrypted one');
    const refused = await cliJson<Refusal>(['info', disk.path, '--format', 'qcow2']);
    expect(refused).toMatchObject({ status: 2, document: { error: { code: 'SECRET_REQUIRED', path: disk.below[1] } } });
    const info = await cliJson<ImageInfo>(['info', disk.path, '--format', 'qcow2', '--secret', `file=${disk.key.file}`]);
    expect(info).toMatchObject({ status: 0, document: { backing: [{ path: disk.below[1] }, { path: disk.below[0] }] } });
  });

  it('unlocks what an image of another format lies on', async () => {
    const disk = await makeDisk('raw');
    const path = scratchPath('overlay.qed');
    await mustRun('qemu-img', ['create', '-q', '-f', 'qed', '-u', '-b', disk.path, '-F', 'qcow2', path, String(SIZE)]);
    const words = ['--format', 'qed', '--backing-format', 'qcow2', '--secret', `file=${disk.key.file}`];
    const result = await cliJson<AllocationResult>(['allocate', path, ...words, '--preallocation', 'metadata', '--drop-backing']);
    expect(result.status, result.stderr).toBe(0);
    await mustRun('qemu-img', ['compare', '-f', 'qed', '-F', 'raw', path, disk.expected]);
  });

  it.each([
    ['another one', 'not the key'],
    ['one without its newline', PASSPHRASE.trim()],
    ['none at all', ''],
    ['one that is no text', Buffer.from([0xff, 0xfe, 0x00])],
  ])('that is %s unlocks nothing, and nothing is changed', async (_what, bytes) => {
    const disk = await makeDisk('raw');
    const wrong = scratchPath('wrong');
    writeFileSync(wrong, bytes);
    const before = await sumsOf([disk.path]);
    const words = [disk.path, '--format', 'qcow2', '--secret', `file=${wrong}`];
    const refused = await cliJson<Refusal>(['allocate', ...words]);
    expect(refused).toMatchObject({ status: 1, document: { error: { code: 'SECRET_WRONG', path: disk.path } } });
    expectOneLine(await cli(['allocate', ...words]), 'SECRET_WRONG');
    expect(await sumsOf([disk.path])).toBe(before);
    expect(statSync(disk.path).size).toBeLessThan(4 * MiB);
  });

  it('is of no use for what QEMU has given up', async () => {
    const [base, key] = [await makeBase(), makeKey()];
    const path = scratchPath('image.qcow2');
    const options = 'encrypt.format=aes,encrypt.key-secret=s';
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', ...key.object, '-b', base, '-F', 'raw', '-o', options, path]);
    const refused = await cliJson<Refusal>(['allocate', path, '--format', 'qcow2', '--secret', `file=${key.file}`]);
    expect(refused).toMatchObject({ status: 1, document: { error: { code: 'UNSUPPORTED', path } } });
  });
});

const read = (path: string) => {
  try {
    return readFileSync(path, 'latin1');
  } catch {
    return '';
  }
};

describe.runIf(runnable)('nobody sees the key', () => {
  const forms = (key: string) => [key, key.trim(), Buffer.from(key).toString('base64'), Buffer.from(key).toString('hex')];
  const expectUnseen = (text: string, where: string) => {
    for (const form of forms(PASSPHRASE)) expect(text.includes(Buffer.from(form).toString('latin1')), where).toBe(false);
  };

  it('in arguments, environments, files, or what is printed; the daemon keeps none', async () => {
    const disk = await makeDisk('raw');
    const words = ['allocate', disk.path, '--format', 'qcow2', '--secret', `file=${disk.key.file}`];
    await using spawned = spawnCli([...words, '--speed', '4M', '--json', '--progress', 'json']);
    await spawned.output('stderr', /"position":[1-9]/);
    const all = [...processesWith(tmpdir()), { pid: spawned.pid }];
    expect(daemonsIn(tmpdir())).toHaveLength(1);
    expect(all.length).toBeGreaterThan(2);
    for (const { pid } of all) {
      expectUnseen(read(`/proc/${pid}/cmdline`), `arguments of ${pid}`);
      expectUnseen(read(`/proc/${pid}/environ`), `environment of ${pid}`);
    }
    const [folder] = readdirSync(tmpdir());
    const files = readdirSync(join(tmpdir(), folder!));
    expect(files.sort()).toEqual(['nbd.sock', 'qmp.sock']);
    {
      await using client = await QmpClient.connect(join(tmpdir(), folder!, 'qmp.sock'));
      const objects = await client.execute('qom-list', { path: '/objects' });
      expect(objects.filter(({ name, type }) => name === 'key' || type.includes('secret'))).toEqual([]);
    }
    const { status, stdout, stderr } = await spawned.exit;
    expect(status, stderr).toBe(0);
    expectUnseen(stdout + stderr, 'what is printed');
    await expectNothingLeft();
    await expectSame(disk);
  });

  it('in what is said of a key that unlocks nothing', async () => {
    const disk = await makeDisk('raw');
    const wrong = makeKey(`${PASSPHRASE}!`);
    for (const more of [[], ['--json'], ['--progress', 'json', '--json']]) {
      const outcome = await cli(['allocate', disk.path, '--format', 'qcow2', '--secret', `file=${wrong.file}`, ...more]);
      expect(outcome.status).toBe(1);
      expectUnseen(outcome.stdout + outcome.stderr, more.join());
    }
    await using image = await open(disk.path, { format: 'qcow2', secret: { file: wrong.file } });
    let error: unknown = await image.allocate().result.catch((caught: unknown) => caught);
    for (; error instanceof Error; error = error.cause) {
      expectUnseen(JSON.stringify(error) + String(error.stack), 'the error');
    }
  });

  it.each(['hunter2', 'file=', 'fd=', 'fd=three', 'fd=-1', 'data=hunter2', ' file=x'])('on the command line: %s is refused', async (word) => {
    for (const command of ['allocate', 'info', 'map', 'verify']) {
      const outcome = await cli([command, 'disk.qcow2', '--secret', word, '--json']);
      expect(outcome.status).toBe(2);
      expect(JSON.parse(outcome.stdout)).toMatchObject({ error: { code: 'USAGE' } });
      expectOneLine(outcome, 'USAGE');
      expect(outcome.stderr).toContain('file=PATH or fd=N');
      expect(outcome.stdout + outcome.stderr).not.toContain('hunter2');
    }
  });
});

describe.runIf(runnable && requires({ tools: ['qemu-nbd'] }))('a key that nothing needs', () => {
  const unused = expect.stringMatching(/key .* is not used/);

  async function imageOf(format: string, ...options: string[]): Promise<string> {
    const path = scratchPath(`image.${format}`);
    await mustRun('qemu-img', ['create', '-q', '-f', format, ...options, path, '1M']);
    return path;
  }

  const TARGETS: Record<string, (key: Key) => Promise<string[]>> = {
    'a raw file': async () => [await imageOf('raw')],
    'a qcow2 image': async () => [await imageOf('qcow2')],
    'a qcow2 image over another': async () => [
      await imageOf('qcow2', '-b', await imageOf('raw'), '-F', 'raw'), '--format', 'qcow2',
    ],
    'a QED image': async () => [await imageOf('qed'), '--format', 'qed'],
    'an export': async () => [(await qemuNbd(await imageOf('raw'), 'raw')).uri, '--exclusive', '--preallocation', 'full'],
    'an encrypted image that lies on nothing': async ({ object }) => {
      const path = scratchPath('image.qcow2');
      await createEncrypted('-f', 'qcow2', ...object, '-o', 'encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10', path, '1M');
      return [path, '--format', 'qcow2'];
    },
  };

  it.each(Object.keys(TARGETS))('is told of by %s, which is allocated all the same', async (name) => {
    const key = makeKey();
    const target = await TARGETS[name]!(key);
    const secret = ['--secret', `file=${key.file}`];
    for (const dry of [['--dry-run'], []]) {
      const { status, stderr, document } = await cliJson<AllocationResult>(['allocate', ...target, ...secret, ...dry]);
      expect(status, stderr).toBe(0);
      expect(document.warnings).toContainEqual(unused);
      expect(stderr).toMatch(/^thicken: warning: the key/m);
    }
    const named = target.filter((_, i) => i === 0 || target[1] === '--format');
    const info = await cliJson<ImageInfo>(['info', ...named, ...secret]);
    expect(info.document.warnings).toContainEqual(unused);
    const without = await cliJson<ImageInfo>(['info', ...named]);
    expect(without.document.warnings).not.toContainEqual(unused);
  });

  it('by one target of several is told of by the others alone', async () => {
    const disk = await makeDisk('raw');
    const words = ['allocate', disk.path, await imageOf('qcow2'), '--format', 'qcow2', '--secret', `file=${disk.key.file}`];
    const { status, document } = await cliJson<AllocationResult[]>(words);
    expect(status).toBe(0);
    expect(document.map(({ warnings }) => warnings.some((text) => /key .* is not used/.test(text)))).toEqual([false, true]);
    for (const command of ['info', 'verify']) {
      const outcome = await cliJson<ImageInfo>([command, disk.path, '--format', 'qcow2', '--secret', `file=${disk.key.file}`]);
      expect(outcome.document.warnings).not.toContainEqual(unused);
    }
  });
});

describe('a secret', () => {
  it('is the bytes of its source as they are, of a pipe too', async () => {
    const { file } = makeKey();
    const bytes = new TextEncoder().encode(PASSPHRASE);
    expect(await readSecret({ file })).toEqual(bytes);
    expect(await readSecret(bytes)).toEqual(bytes);
    const large = scratchPath('large');
    writeFileSync(large, Buffer.alloc(300 * KiB, 'x'));
    const printed = `const { readSecret } = await import(${JSON.stringify(join(cliMain, '../../secret.js'))});
      process.stdout.write(String((await readSecret({ fd: 0 })).length));`;
    const piped = ['-c', 'cat "$0" | "$@"', large, process.execPath, '--input-type=module', '-e', printed];
    expect(await mustRun('sh', piped)).toBe(String(300 * KiB));
  });

  it('is wiped when nobody needs it any more, and takes nothing of its caller’s along', async () => {
    const bytes = new TextEncoder().encode(PASSPHRASE);
    const secret = await Secret.read(bytes);
    expect(secret.base64).toBe(Buffer.from(PASSPHRASE).toString('base64'));
    secret[Symbol.dispose]();
    expect(secret.base64).toBe(Buffer.alloc(bytes.length).toString('base64'));
    expect(new TextDecoder().decode(bytes)).toBe(PASSPHRASE);
  });

  it('that can’t be read, or is none, is told of without what was given', async () => {
    const codeOf = (source: unknown) =>
      readSecret(source as { fd: number }).then(() => 'none', (error: { code: string; message: string }) => {
        expect(error.message).not.toContain('hunter2');
        return error.code;
      });
    expect(await codeOf({ file: '/nowhere/key' })).toBe('ENOENT');
    expect(await codeOf({ file: tmpdir() })).toBe('EISDIR');
    expect(await codeOf({ file: '/dev/zero' })).toBe('USAGE');
    expect(await codeOf({ fd: 99_999 })).toBe('EBADF');
    for (const source of ['hunter2', { fd: 'hunter2' }, { fd: -1 }, { data: 'hunter2' }, null, 5]) {
      expect(await codeOf(source)).toBe('USAGE');
    }
  });
});
