import { execFileSync } from 'node:child_process';
import { chmodSync, mkdirSync, symlinkSync, truncateSync, writeFileSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { open, ThickenError } from '../../lib/index.js';
import type { AllocationRequest } from '../../lib/types.js';
import { hold } from '../support/cleanup.js';
import { mountFilesystem, type Filesystem } from '../support/filesystems.js';
import { hostBytes } from '../support/judges.js';
import { makePattern, sha256 } from '../support/patterns.js';
import { cli, cliMain, mustRun, run, spawnCli, type Outcome } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratch, scratchPath } from '../support/scratch.js';
import {
  cliJson,
  EXT3,
  EXT4,
  expectOneLine,
  KiB,
  makeSparse,
  MiB,
  startAllocation,
  TOOLS,
  XFS,
  type Refusal,
} from './helpers.js';

const asRoot = requires({
  root: true,
  loop: true,
  tools: [...TOOLS, 'chattr', 'setpriv', 'mkfs.ext4', 'mkfs.xfs', 'mount', 'mkfifo'],
});

interface Expected {
  code: string | RegExp;
  status: number;
}

/** With and without --json: one line, its code, the status; and on stdout the same as JSON. */
async function expectError(args: readonly string[], { code, status }: Expected): Promise<Refusal['error']> {
  const plain = await cli(args);
  expect(plain.status, plain.stderr).toBe(status);
  expectOneLine(plain, code);
  expect(plain.stdout).toBe('');
  const json = await cliJson<Refusal>(args);
  expect(json.status).toBe(status);
  expectOneLine(json, code);
  const { error } = json.document;
  expect(error.code).toMatch(typeof code === 'string' ? new RegExp(`^${code}$`) : code);
  expect(error.message).not.toContain('\n');
  return error;
}

/** What must not change. */
async function state(path: string): Promise<unknown> {
  const { size, mtimeMs, mode } = await stat(path);
  return [await hostBytes(path), await sha256(path), size, mtimeMs, mode];
}

async function expectUntouched(path: string, action: () => Promise<unknown>): Promise<void> {
  const before = await state(path);
  await action();
  expect(await state(path)).toEqual(before);
}

describe('what is no image', () => {
  const commands = ['info', 'map', 'allocate', 'verify'] as const;

  it.each(commands)('a missing file (%s)', async (command) => {
    const error = await expectError([command, scratchPath('none.raw')], { code: 'ENOENT', status: 1 });
    expect(error.path).toMatch(/none\.raw$/);
  });

  it.each(commands)('a directory (%s)', async (command) => {
    await expectError([command, scratch()], { code: 'EISDIR', status: 1 });
  });

  it.each(commands)('a FIFO, without waiting for its other end (%s)', async (command) => {
    const path = scratchPath('fifo');
    await mustRun('mkfifo', [path]);
    await expectError([command, path], { code: 'UNSUPPORTED', status: 1 });
  });

  it('a character device', async () => {
    await expectError(['allocate', '/dev/null'], { code: 'UNSUPPORTED', status: 1 });
  });

  it('a link that leads nowhere, or to itself', async () => {
    const [dangling, loop] = [scratchPath('dangling'), scratchPath('loop')];
    symlinkSync('/nowhere/at/all', dangling);
    symlinkSync(loop, loop);
    await expectError(['allocate', dangling], { code: 'ENOENT', status: 1 });
    await expectError(['allocate', loop], { code: 'ELOOP', status: 1 });
  });

  it('a path through a file, an empty name, and one that is too long', async () => {
    const file = makeSparse(scratchPath('file'), 1);
    await expectError(['allocate', `${file}/x`], { code: 'ENOTDIR', status: 1 });
    await expectError(['allocate', ''], { code: 'ENOENT', status: 1 });
    await expectError(['allocate', `${scratch()}/${'x'.repeat(300)}`], { code: 'ENAMETOOLONG', status: 1 });
  });

  it('a name with line ends and terminal codes stays one line', async () => {
    await expectError(['allocate', `${scratch()}/a\nb\u001b[31mc`], { code: 'ENOENT', status: 1 });
  });

  it('an NBD server that is not there, and a URI that is none', async () => {
    await expectError(['allocate', `nbd+unix:///disk?socket=${scratch()}/nobody`], { code: 'NBD_LOST', status: 1 });
    await expectError(['allocate', 'nbd+unix:///disk'], { code: 'USAGE', status: 2 });
  });
});

describe('a foreign header in an image', () => {
  function withHeader(name: string): string {
    const path = scratchPath(name);
    writeFileSync(path, Buffer.concat([Buffer.from('QFI\xfb\0\0\0\x03', 'latin1'), Buffer.alloc(64 * KiB)]));
    truncateSync(path, MiB);
    return path;
  }

  it('is not acted on unless the format is stated', async () => {
    const path = withHeader('disk.raw');
    await expectUntouched(path, () =>
      expectError(['allocate', path], { code: 'FORMAT_REQUIRED', status: 2 }),
    );
    expect((await cli(['info', path])).status).toBe(0);
    expect((await cli(['map', path])).status).toBe(0);
    const content = await sha256(path);
    expect((await cli(['allocate', path, '--format', 'raw'])).status).toBe(0);
    expect(await sha256(path)).toBe(content);
  });

  it('that the name agrees with is read, and refused for what is wrong with it', async () => {
    const path = withHeader('disk.qcow2');
    await expectUntouched(path, () => expectError(['allocate', path], { code: 'QCOW2_CORRUPT', status: 1 }));
  });

  it('of a format that can’t be allocated is refused by name', async () => {
    const path = scratchPath('disk.qed');
    writeFileSync(path, Buffer.concat([Buffer.from('QED\0', 'latin1'), Buffer.alloc(64 * KiB)]));
    await expectUntouched(path, () => expectError(['allocate', path], { code: 'UNSUPPORTED', status: 1 }));
  });

  it('an unknown format is a usage error', async () => {
    const path = makeSparse(scratchPath('disk.raw'), MiB);
    await expectUntouched(path, () =>
      expectError(['allocate', path, '--format', 'floppy'], { code: 'USAGE', status: 2 }),
    );
  });
});

describe('options that make no sense', () => {
  const size = 8 * MiB;
  const wrong: [string, string[], Expected][] = [
    ['a negative offset', ['--offset', '-1'], { code: 'USAGE', status: 2 }],
    ['a negative offset after =', ['--offset=-1'], { code: 'USAGE', status: 2 }],
    ['a negative length', ['--length=-4096'], { code: 'USAGE', status: 2 }],
    ['a fractional offset', ['--offset', '1.5'], { code: 'USAGE', status: 2 }],
    ['a fractional length', ['--length', '0.1'], { code: 'USAGE', status: 2 }],
    ['NaN', ['--offset', 'NaN'], { code: 'USAGE', status: 2 }],
    ['Infinity', ['--length', 'Infinity'], { code: 'USAGE', status: 2 }],
    ['an empty size', ['--length', ''], { code: 'USAGE', status: 2 }],
    ['hexadecimal', ['--length', '0x1000'], { code: 'USAGE', status: 2 }],
    ['an exponent', ['--length', '1e3'], { code: 'USAGE', status: 2 }],
    ['2^53', ['--offset', String(2 ** 53)], { code: 'USAGE', status: 2 }],
    ['beyond 2^53 by suffix', ['--length', '8E'], { code: 'USAGE', status: 2 }],
    ['an offset beyond the end', ['--offset', String(size + 1)], { code: 'RANGE', status: 2 }],
    ['a length beyond the end', ['--length', String(size + 1)], { code: 'RANGE', status: 2 }],
    ['an offset with a length beyond the end', ['--offset', '4M', '--length', '5M'], { code: 'RANGE', status: 2 }],
    ['the largest offset there is', ['--offset', String(2 ** 53 - 1)], { code: 'RANGE', status: 2 }],
    ['a bad size suffix', ['--length', '4X'], { code: 'USAGE', status: 2 }],
    ['a doubled size suffix', ['--length', '4MB'], { code: 'USAGE', status: 2 }],
    ['an unknown option', ['--frobnicate'], { code: 'USAGE', status: 2 }],
    ['an unknown level', ['--preallocation', 'most'], { code: 'USAGE', status: 2 }],
    ['metadata of a raw image', ['--preallocation', 'metadata'], { code: 'USAGE', status: 2 }],
    ['an unknown route', ['--route', 'scenic'], { code: 'USAGE', status: 2 }],
    ['a device’s route', ['--route', 'device'], { code: 'USAGE', status: 2 }],
    ['a route that can’t', ['--route', 'fallocate', '--preallocation', 'full'], { code: 'USAGE', status: 2 }],
    ['no speed at all', ['--speed', '0'], { code: 'USAGE', status: 2 }],
    ['a bad speed', ['--speed', 'fast'], { code: 'USAGE', status: 2 }],
    ['a bad number of requests', ['--iops', '-5'], { code: 'USAGE', status: 2 }],
    ['more than all the space', ['--keep-free', '101%'], { code: 'USAGE', status: 2 }],
    ['a bad share', ['--keep-free', '%'], { code: 'USAGE', status: 2 }],
    ['an option without its value', ['--offset'], { code: 'USAGE', status: 2 }],
    ['an unknown kind of progress', ['--progress', 'loud'], { code: 'USAGE', status: 2 }],
  ];
  it.each(wrong)('%s', async (_name, options, expected) => {
    const path = makeSparse(scratchPath('disk.raw'), size);
    await expectUntouched(path, () => expectError(['allocate', path, ...options], expected));
    expect(await hostBytes(path)).toBe(0);
  });

  it('no target, no command, and an unknown command', async () => {
    for (const args of [['allocate'], ['frobnicate'], ['map'], ['info', 'a', 'b']]) {
      await expectError(args, { code: 'USAGE', status: 2 });
    }
    const bare = await cli([]);
    expect(bare.status).toBe(2);
  });
});

describe('numbers given to the library', () => {
  const size = MiB;
  const wrong = [-1, 0.5, NaN, Infinity, -Infinity, 2 ** 53, 2 ** 60];

  async function codeOf(promise: Promise<unknown>): Promise<{ code: string; range: boolean; brand: boolean }> {
    const error = await promise.then(
      () => new Error('no error'),
      (reason: Error & { code: string }) => reason,
    );
    return {
      code: (error as ThickenError).code,
      range: error instanceof RangeError,
      brand: error instanceof ThickenError,
    };
  }

  const refused = { code: 'RANGE', range: true, brand: true };

  it.each(['offset', 'length'] as const)('a wrong %s is a RangeError, and changes nothing', async (name) => {
    const path = makeSparse(scratchPath('disk.raw'), size);
    await using image = await open(path);
    for (const value of [...wrong, size + 1, '4096', 4096n, {}]) {
      const request = { [name]: value } as AllocationRequest;
      expect(await codeOf(image.allocate(request).result), String(value)).toEqual(refused);
      expect(await codeOf(image.plan(request)), String(value)).toEqual(refused);
      expect(await codeOf(image.verify(request)), String(value)).toEqual(refused);
      expect(await codeOf(image.extents(request).next()), String(value)).toEqual(refused);
      expect(await codeOf(image.extentPages(request).next()), String(value)).toEqual(refused);
    }
    expect(await hostBytes(path)).toBe(0);
  });

  it('a range that ends beyond the end, or overflows, is a RangeError', async () => {
    const path = makeSparse(scratchPath('disk.raw'), size);
    await using image = await open(path);
    for (const request of [
      { offset: size - 1, length: 2 },
      { offset: Number.MAX_SAFE_INTEGER, length: Number.MAX_SAFE_INTEGER },
      { offset: size + 1, length: 0 },
    ]) {
      expect(await codeOf(image.allocate(request).result)).toEqual(refused);
    }
  });

  it('wrong levels, routes, speeds and shares are refused', async () => {
    const path = makeSparse(scratchPath('disk.raw'), size);
    await using image = await open(path);
    const requests = [
      { preallocation: 'most' },
      { preallocation: 'metadata' },
      { route: 'scenic' },
      { route: 'device' },
      { speed: -1 },
      { iops: NaN },
      { keepFree: '200%' },
      { keepFree: -1 },
      { keepFree: 'much' },
    ];
    for (const request of requests) {
      const { code } = await codeOf(image.allocate(request as AllocationRequest).result);
      expect(code, JSON.stringify(request)).toMatch(/^(USAGE|RANGE)$/);
    }
    expect(await hostBytes(path)).toBe(0);
  });
});

describe.runIf(asRoot)('a file that can’t be written', () => {
  it.each(['falloc', 'full'])('as another user than its owner (%s)', async (level) => {
    // The scratch folder is for its owner only.
    const folder = scratchPath('open');
    mkdirSync(folder);
    chmodSync(scratch(), 0o755);
    const path = makeSparse(`${folder}/read-only.raw`, MiB);
    chmodSync(path, 0o444);
    await expectUntouched(path, async () => {
      const outcome = await asNobody(['allocate', path, '--preallocation', level]);
      expect(outcome.status, outcome.stderr).toBe(1);
      expectOneLine(outcome, 'EACCES');
    });
    chmodSync(path, 0o400);
    const unreadable = await asNobody(['info', path]);
    expect(unreadable.status).toBe(1);
    expectOneLine(unreadable, 'EACCES');
  });

  it.each(['falloc', 'full'])('immutable (%s)', async (level) => {
    const path = makeSparse(scratchPath('immutable.raw'), MiB);
    await mustRun('chattr', ['+i', path]);
    const release = hold({
      release: async () => void (await mustRun('chattr', ['-i', path])),
      releaseSync: () => void execFileSync('chattr', ['-i', path]),
    });
    try {
      await expectUntouched(path, () =>
        expectError(['allocate', path, '--preallocation', level], { code: /^(EPERM|EACCES)$/, status: 1 }),
      );
    } finally {
      await release();
    }
  });

  it.each(['falloc', 'full'])('append-only (%s)', async (level) => {
    const path = makeSparse(scratchPath('append.raw'), MiB);
    await mustRun('chattr', ['+a', path]);
    const release = hold({
      release: async () => void (await mustRun('chattr', ['-a', path])),
      releaseSync: () => void execFileSync('chattr', ['-a', path]),
    });
    try {
      await expectUntouched(path, () =>
        expectError(['allocate', path, '--preallocation', level], { code: /^(EPERM|EACCES)$/, status: 1 }),
      );
    } finally {
      await release();
    }
  });

  it.each(['falloc', 'full'])('on a file system mounted read-only (%s)', async (level) => {
    await using mounted = await mountFilesystem(EXT4);
    const path = makeSparse(`${mounted.path}/disk.raw`, MiB);
    await mustRun('mount', ['-o', 'remount,ro', mounted.path]);
    await expectUntouched(path, () =>
      expectError(['allocate', path, '--preallocation', level], { code: 'EROFS', status: 1 }),
    );
    expect((await cli(['verify', path])).status).toBe(3);
  });

  /** The command line as a user without any rights: not all of the tree may be theirs to read. */
  function asNobody(args: readonly string[]): Promise<Outcome> {
    const user = ['--reuid=65534', '--regid=65534', '--clear-groups', '--inh-caps=-all', '--bounding-set=-all'];
    return run('setpriv', [...user, process.execPath, cliMain, ...args]);
  }
});

describe.runIf(asRoot)('a file that is truncated meanwhile', () => {
  let mounts: Filesystem[];
  beforeAll(async () => {
    mounts = [await mountFilesystem(EXT3), await mountFilesystem(EXT4), await mountFilesystem(XFS)];
  });
  afterAll(async () => {
    for (const mounted of mounts) await mounted.dispose();
  });

  const cases = [
    { name: 'zeros on ext3-format', mount: 0, level: 'falloc' },
    { name: 'full on ext4', mount: 1, level: 'full' },
    { name: 'full on xfs', mount: 2, level: 'full' },
    { name: 'falloc on ext4', mount: 1, level: 'falloc' },
    { name: 'falloc on xfs', mount: 2, level: 'falloc' },
  ];
  it.each(cases)('ends the run in an error, and is not grown again ($name)', async ({ mount, level }) => {
    const path = `${mounts[mount]!.path}/truncated.raw`;
    await makePattern(path, [
      { kind: 'data', length: MiB },
      { kind: 'hole', length: 63 * MiB },
    ]);
    const args = ['allocate', path, '--preallocation', level, '--speed', '16M', '--json', '--progress', 'json'];
    await using spawned = await startAllocation(spawnCli(args));
    truncateSync(path, MiB / 2);
    const content = await sha256(path);
    const { status, stdout } = await spawned.exit;
    expect(status, stdout).toBe(1);
    const document = JSON.parse(stdout) as Refusal;
    expect(document.error).toMatchObject({ code: 'CHANGED', path });
    expect(document.done!.allocated).toBeGreaterThan(0);
    expect((await stat(path)).size).toBe(MiB / 2);
    expect(await sha256(path)).toBe(content);
  });

  it('between open and allocate is seen', async () => {
    const path = makeSparse(`${mounts[1]!.path}/between.raw`, 8 * MiB);
    await using image = await open(path);
    truncateSync(path, MiB);
    await expect(image.allocate().result).rejects.toMatchObject({ code: 'CHANGED' });
    expect(await hostBytes(path)).toBe(0);
    expect((await stat(path)).size).toBe(MiB);
  });
});
