/** The JSON documents, field by field, of every kind of target: programs rely on them to the letter. */
import { describe, expect, test } from 'vitest';
import { open, type AllocationResult, type ImageInfo, type MapEntry, type Verdict } from '../../lib/index.js';
import { qemuNbd } from '../nbd/servers.js';
import { cliJson, KiB, makeSparse, MiB } from '../storage/helpers.js';
import { attachLoop } from '../support/loop.js';
import { mustRun, spawnCli, startQemu } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';

const TEXT = expect.any(String);
const BYTES = expect.toSatisfy((value: unknown) => Number.isSafeInteger(value) && Number(value) >= 0);
const FLAG = expect.any(Boolean);
const oneOf = (...values: unknown[]) => expect.toBeOneOf(values);
const orNull = (value: unknown) => oneOf(value, null);
const RANGE = { offset: BYTES, length: BYTES };
const LEVEL = oneOf('metadata', 'falloc', 'full');
const WARNINGS = expect.toSatisfy(
  (value: unknown) => Array.isArray(value) && value.every((warning) => typeof warning === 'string'),
);

const INFO = {
  target: TEXT,
  kind: oneOf('file', 'block', 'qemu', 'nbd'),
  format: TEXT,
  formatBy: oneOf('option', 'suffix', 'probe'),
  virtualSize: orNull(BYTES),
  fileSize: orNull(BYTES),
  hostAllocated: orNull(BYTES),
  allocated: orNull(BYTES),
  missing: orNull(BYTES),
  needed: { metadata: orNull(BYTES), falloc: orNull(BYTES), full: orNull(BYTES) },
  granularity: BYTES,
  inUse: expect.toSatisfy(isUse),
  filesystem: expect.toSatisfy(isFilesystem),
  backing: expect.any(Array),
  snapshots: BYTES,
  warnings: WARNINGS,
};

const RESULT = {
  target: TEXT,
  format: TEXT,
  preallocation: LEVEL,
  requested: RANGE,
  effective: RANGE,
  plan: expect.any(Array),
  before: { allocated: orNull(BYTES) },
  after: orNull({ allocated: orNull(BYTES) }),
  allocated: BYTES,
  skipped: BYTES,
  seconds: expect.any(Number),
  verified: orNull(FLAG),
  guarantee: FLAG,
  warnings: WARNINGS,
};

const VERDICT = { target: TEXT, preallocation: LEVEL, satisfied: FLAG, missing: expect.any(Array), warnings: WARNINGS };

const keysOf = (value: object) => Object.keys(value).sort();
const has = (value: unknown, keys: string[]) => JSON.stringify(keysOf(value as object)) === JSON.stringify(keys.toSorted());

function isUse(value: unknown): boolean {
  if (value === null || !has(value, ['by', 'locks'])) return value === null;
  const { by, locks } = value as NonNullable<ImageInfo['inUse']>;
  return typeof by === 'string' && locks.every((byte) => Number.isSafeInteger(byte));
}

function isFilesystem(value: unknown): boolean {
  const keys = ['type', 'free', 'abilities', 'cow', 'reflinked'];
  if (value === null || !has(value, keys)) return value === null;
  const { type, free, abilities, cow, reflinked } = value as NonNullable<ImageInfo['filesystem']>;
  const named = typeof type === 'string' && abilities.every((name) => typeof name === 'string');
  return named && Number.isSafeInteger(free) && typeof cow === 'boolean' && [true, false, null].includes(reflinked);
}

interface Subject extends AsyncDisposable {
  /** What names it on the command line. */
  args: string[];
  /** What it is called in the documents. */
  target: string;
  kind: ImageInfo['kind'];
  format: string;
  formatBy: ImageInfo['formatBy'];
  /** Of its layers, as `info` tells them. */
  backing?: object[];
  /** What allocate needs beside. */
  allocate?: string[];
  /** The exit status of a verify after an allocate. */
  verified?: number;
}

const SIZE = 4 * MiB;
const free = { [Symbol.asyncDispose]: () => Promise.resolve() };

async function image(format: string, ...options: string[]): Promise<string> {
  const path = scratchPath(`image.${format}`);
  const size = options.includes('-b') ? [] : [String(SIZE)];
  await mustRun('qemu-img', ['create', '-q', '-f', format, ...options, path, ...size]);
  await qemuIo(path, format, 'write -q -P 7 1M 200k');
  return path;
}

async function overlay(format = 'qcow2'): Promise<{ path: string; base: string }> {
  const base = scratchPath('base.raw');
  await mustRun('qemu-img', ['create', '-q', '-f', 'raw', base, String(SIZE)]);
  await qemuIo(base, 'raw', 'write -q -P 3 2M 100k');
  return { path: await image(format, '-b', base, '-F', 'raw'), base };
}

const SUBJECTS: Record<string, () => Promise<Subject>> = {
  'a raw image': async () => {
    const path = await image('raw');
    return { args: [path], target: path, kind: 'file', format: 'raw', formatBy: 'probe', ...free };
  },
  'a qcow2 image': async () => {
    const path = await image('qcow2');
    return { args: [path], target: path, kind: 'file', format: 'qcow2', formatBy: 'suffix', ...free };
  },
  'a qcow2 image with a backing file': async () => {
    const { path, base } = await overlay();
    const backing = [{ path: base, format: 'raw', virtualSize: SIZE, allocated: BYTES }];
    const args = ['--format', 'qcow2', path];
    return { args, target: path, kind: 'file', format: 'qcow2', formatBy: 'option', backing, ...free };
  },
  'a QED image with a backing file': async () => {
    const { path, base } = await overlay('qed');
    const backing = [{ path: base, format: 'raw', virtualSize: SIZE, allocated: BYTES }];
    const args = ['--format', 'qed', path];
    return { args, target: path, kind: 'file', format: 'qed', formatBy: 'option', backing, ...free };
  },
  'an export': async () => {
    const path = await image('raw');
    const server = await qemuNbd(path, 'raw');
    return {
      args: [server.uri], target: server.uri, kind: 'nbd', format: 'raw', formatBy: 'probe',
      allocate: ['--exclusive'], verified: 3, [Symbol.asyncDispose]: () => server[Symbol.asyncDispose](),
    };
  },
  'a disk of a guest': async () => {
    const { path, base } = await overlay();
    const qemu = await startQemu({ file: path, format: 'qcow2', kind: 'guest' });
    const backing = [{ path: base, format: 'raw', virtualSize: SIZE }];
    return {
      args: ['--qmp', qemu.qmp, '--device', 'disk0'], target: `${qemu.qmp}#disk0`, kind: 'qemu', format: 'qcow2',
      formatBy: 'option', backing, [Symbol.asyncDispose]: () => qemu.dispose(),
    };
  },
  'a raw disk of a guest': async () => {
    const qemu = await startQemu({ file: await image('raw'), kind: 'guest' });
    return {
      args: ['--qmp', qemu.qmp, '--device', 'disk0'], target: `${qemu.qmp}#disk0`, kind: 'qemu', format: 'raw',
      formatBy: 'option', [Symbol.asyncDispose]: () => qemu.dispose(),
    };
  },
  'a loop device': async () => {
    const loop = await attachLoop({ file: await image('raw') });
    return {
      args: [loop.device], target: loop.device, kind: 'block', format: 'raw', formatBy: 'probe',
      [Symbol.asyncDispose]: () => loop[Symbol.asyncDispose](),
    };
  },
};

const tools = ['qemu-img', 'qemu-io', 'qemu-nbd', 'qemu-storage-daemon', 'qemu-system-x86_64'];
const runnable = requires({ root: true, loop: true, tools });

/** Beside the document stand warnings alone, those that it has. */
function expectAside(stderr: string, warnings: readonly string[]): void {
  expect(stderr).toBe(warnings.map((warning) => `thicken: warning: ${warning}\n`).join(''));
}

describe.runIf(runnable).each(Object.keys(SUBJECTS))('of %s', (name) => {
  test('info --json', async () => {
    await using subject = await SUBJECTS[name]!();
    const { status, stderr, document } = await cliJson<ImageInfo>(['info', ...subject.args]);
    expect(status, stderr).toBe(0);
    const { target, kind, format, formatBy, backing = [] } = subject;
    expect(document).toEqual({ ...INFO, target, kind, format, formatBy, backing, virtualSize: SIZE });
    expectAside(stderr, document.warnings);
  });

  test('map --json', async () => {
    await using subject = await SUBJECTS[name]!();
    const { status, stderr, document } = await cliJson<MapEntry[]>(['map', ...subject.args]);
    expect(status, stderr).toBe(0);
    let end = 0;
    for (const entry of document) {
      expect(entry).toEqual({
        start: end, length: BYTES, depth: BYTES, present: FLAG, zero: FLAG, data: FLAG,
        host: oneOf('hole', 'unwritten', 'written', 'shared', 'unknown'),
        ...('offset' in entry && { offset: BYTES }),
        ...('file' in entry && { file: TEXT }),
      });
      end += entry.length;
    }
    expect(end).toBe(SIZE);
  });

  test('verify --json, allocate --json, with --dry-run and without', async () => {
    await using subject = await SUBJECTS[name]!();
    const { args, target, format, allocate: more = [] } = subject;
    const before = await cliJson<Verdict>(['verify', ...args]);
    expect(before).toMatchObject({ status: 3, document: { satisfied: false } });
    expectVerdict(before.document, target);

    const range = ['--offset', '1000', '--length', String(MiB)];
    const planned = await cliJson<AllocationResult>(['allocate', '--dry-run', ...more, ...args, ...range]);
    expect(planned.status, planned.stderr).toBe(0);
    expect(planned.document).toMatchObject({ after: null, verified: null, allocated: 0 });
    expectResult(planned.document, { target, format, requested: { offset: 1000, length: MiB } });

    const done = await cliJson<AllocationResult>(['allocate', ...more, ...args]);
    expect(done.status, done.stderr).toBe(0);
    const whole = { offset: 0, length: SIZE };
    expectResult(done.document, { target, format, requested: whole, effective: whole, after: { allocated: orNull(BYTES) } });
    expectAside(done.stderr, done.document.warnings);

    const after = await cliJson<Verdict>(['verify', ...args]);
    expect(after.status).toBe(subject.verified ?? 0);
    expectVerdict(after.document, target);
  });
});

describe.runIf(runnable)('of an image that names a backing file, without --format', () => {
  test.each(['qcow2', 'qed'])('info tells the name and the size from the header alone (%s)', async (format) => {
    const { path, base } = await overlay(format);
    const { document } = await cliJson<ImageInfo>(['info', path]);
    const backing = [{ path: base, format: format === 'qed' ? oneOf(null, 'raw') : 'raw', virtualSize: null }];
    expect(document).toEqual({ ...INFO, format, formatBy: 'suffix', virtualSize: SIZE, backing });
  });
});

test.runIf(runnable).each(['qed', 'vdi'])('map of a %s image names no offset, which QEMU does not tell', async (format) => {
  const path = await image(format);
  const { document } = await cliJson<MapEntry[]>(['map', '--format', format, path]);
  expect(document.length).toBeGreaterThan(1);
  expect(document.filter((entry) => 'offset' in entry)).toEqual([]);
  expect(document.some(({ data }) => data)).toBe(true);
});

function expectResult(document: AllocationResult, particular: object): void {
  expect(document).toEqual({ ...RESULT, ...particular });
  const routes = ['fallocate', 'zero-write', 'unshare', 'device', 'qcow2', 'reserve', 'populate', 'stream', 'nbd-write'];
  expect(document.plan.length).toBeGreaterThan(0);
  for (const step of document.plan) expect(step).toEqual({ route: oneOf(...routes), ...RANGE, reason: TEXT });
}

function expectVerdict(document: Verdict, target: string): void {
  expect(document).toEqual({ ...VERDICT, target, preallocation: 'falloc' });
  for (const part of document.missing) expect(part).toEqual({ ...RANGE, why: TEXT });
}

describe('an error', () => {
  const FIELDS = ['code', 'message', 'errno', 'syscall', 'path', 'offset', 'length', 'needed', 'available'];

  test('of a missing file has its code, errno, call and path', async () => {
    const path = scratchPath('absent.raw');
    const { status, document } = await cliJson(['info', path]);
    expect([status, document]).toEqual([1, { error: { code: 'ENOENT', message: TEXT, errno: 2, syscall: 'stat', path } }]);
  });

  test('of a range past the end has status 2, and no field beyond the contract', async () => {
    const { status, document } = await cliJson<{ target: string; error: object }>(
      ['allocate', makeSparse(scratchPath('x.raw'), MiB), '--offset', '1M', '--length', '1'],
    );
    expect(status).toBe(2);
    expect(keysOf(document)).toEqual(['error', 'target']);
    expect(document.error).toMatchObject({ code: 'RANGE' });
    expect(keysOf(document.error).filter((key) => !FIELDS.includes(key))).toEqual([]);
  });

  test('of a full file system carries what is needed and available', async () => {
    const path = makeSparse(scratchPath('huge.raw'), 2 ** 43);
    const { status, document } = await cliJson<{ error: object }>(['allocate', path]);
    expect(status).toBe(1);
    expect(document.error).toMatchObject({ code: oneOf('ENOSPC', 'EDQUOT'), path, needed: BYTES, available: BYTES });
  });
});

describe('--route', () => {
  test('takes each route by its name; one that is nothing for the image is USAGE of its own', async () => {
    const path = makeSparse(scratchPath('x.raw'), MiB);
    for (const route of ['device', 'nbd-write', 'populate', 'stream', 'reserve', 'qcow2']) {
      const { status, document } = await cliJson(['allocate', path, '--route', route]);
      expect([status, document]).toMatchObject([2, { target: path, error: { code: 'USAGE', message: expect.stringContaining(`route ${route} `) } }]);
    }
  });

  test.runIf(requires({ tools: ['qemu-img', 'qemu-io'] }))('qcow2 allocates a qcow2 image', async () => {
    const path = await image('qcow2');
    const { status, document } = await cliJson<AllocationResult>(['allocate', path, '--route', 'qcow2']);
    expect([status, document.verified]).toEqual([0, true]);
    expect(new Set(document.plan.map(({ route }) => route))).toEqual(new Set(['qcow2']));
  });
});

describe('what is cancelled before anything is done', () => {
  test('says so for each target, with what was done: nothing', async () => {
    const paths = ['a', 'b'].map((name) => makeSparse(scratchPath(`${name}.raw`), 64 * MiB));
    const args = ['allocate', ...paths, '--json', '--preallocation', 'full', '--speed', '2M', '--progress', 'json'];
    await using spawned = spawnCli(args);
    await spawned.output('stderr', /"position":[1-9]/);
    spawned.kill('SIGINT');
    const { status, stdout } = await spawned.exit;
    const [first, second] = JSON.parse(stdout) as { done: object }[];
    expect(status).toBe(130);
    expect(first!.done).toMatchObject({ allocated: BYTES, before: { allocated: BYTES } });
    expect(second).toEqual({
      target: paths[1],
      error: { code: 'CANCELLED', message: TEXT, path: paths[1] },
      done: { requested: null, effective: null, before: { allocated: null }, allocated: 0, skipped: 0, seconds: 0 },
    });
  });

  test('by an AbortSignal carries it, too', async () => {
    await using disk = await open(makeSparse(scratchPath('x.raw'), MiB));
    const { result } = disk.allocate({ signal: AbortSignal.abort(), offset: 1, length: KiB });
    const effective = { offset: 0, length: disk.granularity };
    const done = { requested: { offset: 1, length: KiB }, effective, before: { allocated: null }, allocated: 0, skipped: 0 };
    await expect(result).rejects.toMatchObject({ code: 'CANCELLED', done });
  });
});
