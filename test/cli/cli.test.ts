import { execFileSync } from 'node:child_process';
import { closeSync, ftruncateSync, mkdirSync, openSync, statSync, writeFileSync, writeSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import type { AllocationDone, AllocationResult, ImageInfo, MapEntry, Progress, Verdict } from '../../lib/index.js';
import { nbdkit } from '../nbd/servers.js';
import { qemuMap } from '../support/judges.js';
import { makePattern, type Segment } from '../support/patterns.js';
import { cli, cliMain, run, spawnCli, start, type Outcome } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';

const KIB = 1024;
const MIB = 1024 * KIB;

const MIXED: Segment[] = [
  { kind: 'data', length: 64 * KIB },
  { kind: 'hole', length: 192 * KIB },
  { kind: 'unwritten', length: 128 * KIB },
  { kind: 'data', length: 64 * KIB },
  { kind: 'hole', length: 64 * KIB },
];
const SIZE = 512 * KIB;

async function mixed(name = 'disk.raw'): Promise<string> {
  const path = scratchPath(name);
  await makePattern(path, MIXED);
  return path;
}

function sparse(length: number, name = 'sparse.raw'): string {
  const path = scratchPath(name);
  const descriptor = openSync(path, 'w');
  ftruncateSync(descriptor, length);
  closeSync(descriptor);
  return path;
}

/** The one JSON document on stdout, which ends with a newline. */
function documentOf<T>({ stdout }: Outcome): T {
  expect(stdout.endsWith('\n')).toBe(true);
  return JSON.parse(stdout) as T;
}

interface Failure {
  target: string;
  error: { code: string; message: string };
  done?: AllocationDone;
}

function linesOf(text: string): string[] {
  expect(text === '' || text.endsWith('\n')).toBe(true);
  return text.split('\n').slice(0, -1);
}

const keysOf = (value: object) => Object.keys(value).sort();

const RESULT_KEYS = [
  'after', 'allocated', 'before', 'effective', 'format', 'guarantee', 'plan', 'preallocation', 'requested',
  'seconds', 'skipped', 'target', 'verified', 'warnings',
];

describe('info --json', () => {
  test('has the fields of the contract, and right numbers', async () => {
    const path = await mixed();
    const outcome = await cli(['info', '--json', path]);
    const info = documentOf<ImageInfo>(outcome);
    expect(keysOf(info)).toEqual([
      'allocated', 'backing', 'fileSize', 'filesystem', 'format', 'formatBy', 'granularity', 'hostAllocated',
      'inUse', 'kind', 'missing', 'needed', 'snapshots', 'target', 'virtualSize', 'warnings',
    ]);
    expect(keysOf(info.needed)).toEqual(['falloc', 'full', 'metadata']);
    expect(keysOf(info.filesystem ?? {})).toEqual(['abilities', 'cow', 'free', 'reflinked', 'type']);
    expect(info).toMatchObject({
      target: path, kind: 'file', format: 'raw', formatBy: 'probe', virtualSize: SIZE, fileSize: SIZE,
      hostAllocated: statSync(path).blocks * 512, allocated: 256 * KIB, missing: 256 * KIB,
      needed: { metadata: null, falloc: 256 * KIB, full: 256 * KIB }, inUse: null, backing: [],
    });
    expect([outcome.status, outcome.stderr]).toEqual([0, '']);
  });

  test('reports a format that only the bytes speak for, and knows nothing that would need it', async () => {
    const path = scratchPath('disk.img');
    const head = Buffer.alloc(64 * KIB);
    head.write('QFI\xfb', 'latin1');
    head.writeBigUInt64BE(BigInt(5 * MIB), 24);
    writeFileSync(path, head);
    const info = documentOf<ImageInfo>(await cli(['info', '--json', path]));
    expect(info).toMatchObject({ format: 'qcow2', formatBy: 'probe', allocated: null, missing: null, virtualSize: 5 * MIB });
    expect(info.warnings.length).toBeGreaterThan(0);
  });
});

describe('map --json', () => {
  test('has the fields of the contract, entries without a gap', async () => {
    const entries = documentOf<MapEntry[]>(await cli(['map', '--json', await mixed()]));
    let end = 0;
    for (const entry of entries) {
      expect(keysOf(entry)).toEqual(['data', 'depth', 'host', 'length', 'offset', 'present', 'start', 'zero']);
      expect(entry.start).toBe(end);
      end += entry.length;
    }
    expect(end).toBe(SIZE);
    expect(entries.map(({ host, length }) => [host, length])).toEqual([
      ['written', 64 * KIB], ['hole', 192 * KIB], ['unwritten', 128 * KIB], ['written', 64 * KIB], ['hole', 64 * KIB],
    ]);
  });

  test('is what --output json gives', async () => {
    const path = await mixed();
    expect((await cli(['map', '--output', 'json', path])).stdout).toBe((await cli(['map', '--json', path])).stdout);
  });

  test.runIf(requires({ tools: ['qemu-img'] }))('tells the guest’s side as qemu-img map does', async () => {
    const path = await mixed();
    const ours = documentOf<MapEntry[]>(await cli(['map', '--json', path]));
    expect(merged(ours)).toEqual(merged(await qemuMap(path)));
  });

  test('is an empty array for an empty image, and for a length of 0', async () => {
    expect((await cli(['map', '--json', sparse(0)])).stdout.trim()).toBe('[]');
    expect((await cli(['map', '--json', '--length', '0', sparse(MIB)])).stdout.trim()).toBe('[]');
  });

  test('is clipped to its range', async () => {
    const entries = documentOf<MapEntry[]>(await cli(['map', '--json', '--offset', '60k', '--length', '8k', await mixed()]));
    expect(entries.map(({ start, length, host }) => [start, length, host])).toEqual([
      [60 * KIB, 4 * KIB, 'written'], [64 * KIB, 4 * KIB, 'hole'],
    ]);
  });
});

interface Guest {
  start: number;
  length: number;
  zero: boolean;
  data: boolean;
}

/** Neighbours of the same kind as one. */
function merged(entries: Guest[]): Guest[] {
  const result: Guest[] = [];
  for (const { start: from, length, zero, data } of entries) {
    const last = result.at(-1);
    if (last && last.zero === zero && last.data === data) last.length += length;
    else result.push({ start: from, length, zero, data });
  }
  return result;
}

describe('allocate --json', () => {
  test('has the fields of the contract, and what was done', async () => {
    const path = await mixed();
    const outcome = await cli(['allocate', '--json', path]);
    const result = documentOf<AllocationResult>(outcome);
    expect(keysOf(result)).toEqual(RESULT_KEYS);
    expect(result).toMatchObject({
      target: path, format: 'raw', preallocation: 'falloc',
      requested: { offset: 0, length: SIZE }, effective: { offset: 0, length: SIZE },
      before: { allocated: 256 * KIB }, after: { allocated: SIZE }, allocated: 256 * KIB, skipped: 256 * KIB,
      verified: true, guarantee: true, warnings: [],
    });
    expect(result.plan.map(({ route, offset, length }) => [route, offset, length])).toEqual([
      ['fallocate', 64 * KIB, 192 * KIB], ['fallocate', 448 * KIB, 64 * KIB],
    ]);
    for (const step of result.plan) expect(keysOf(step)).toEqual(['length', 'offset', 'reason', 'route']);
    expect([outcome.status, outcome.stderr]).toEqual([0, '']);
  });

  test('does nothing when it is run again', async () => {
    const path = await mixed();
    await cli(['allocate', path]);
    const result = documentOf<AllocationResult>(await cli(['allocate', '--json', path]));
    expect(result).toMatchObject({ plan: [], allocated: 0, skipped: SIZE, verified: true });
  });

  test('widens a range to blocks, names both ranges, and touches nothing else', async () => {
    const path = sparse(MIB);
    const result = documentOf<AllocationResult>(await cli(['allocate', '--json', '--offset', '5000', '--length', '1', path]));
    expect(result).toMatchObject({
      requested: { offset: 5000, length: 1 }, effective: { offset: 4096, length: 4096 }, allocated: 4096,
    });
    expect(statSync(path).blocks * 512).toBe(4096);
  });

  test('clips the effective range to an image that is no multiple of a block', async () => {
    const result = documentOf<AllocationResult>(await cli(['allocate', '--json', '--offset', '4k', sparse(10_000)]));
    expect(result).toMatchObject({ effective: { offset: 4096, length: 5904 }, after: { allocated: 5904 }, verified: true });
  });

  test('does nothing for a length of 0', async () => {
    const path = sparse(MIB);
    const outcome = await cli(['allocate', '--json', '--offset', '5000', '--length', '0', path]);
    expect(outcome.status).toBe(0);
    expect(documentOf(outcome)).toMatchObject({ effective: { offset: 5000, length: 0 }, allocated: 0 });
    expect(statSync(path).blocks).toBe(0);
  });

  test('with --dry-run has the same fields, and changes nothing', async () => {
    const path = await mixed();
    const { blocks, mtimeMs } = statSync(path);
    const outcome = await cli(['allocate', '--json', '--dry-run', path]);
    const result = documentOf<AllocationResult>(outcome);
    expect(keysOf(result)).toEqual(RESULT_KEYS);
    expect(result).toMatchObject({ after: null, verified: null, allocated: 0, before: { allocated: 256 * KIB } });
    expect(result.plan.length).toBe(2);
    expect(statSync(path)).toMatchObject({ blocks, mtimeMs });
    expect(outcome.status).toBe(0);
  });

  test('of several targets is an array, each with its result or its error, and the highest status', async () => {
    const targets = [sparse(MIB), '/nonexistent/disk', await mixed()];
    const outcome = await cli(['allocate', '--json', ...targets]);
    const documents = documentOf<(Partial<AllocationResult> & Partial<Failure>)[]>(outcome);
    expect(documents.map(({ target }) => target)).toEqual(targets);
    expect(keysOf(documents[1] ?? {})).toEqual(['error', 'target']);
    expect(documents[1]?.error?.code).toBe('ENOENT');
    expect([documents[0]?.verified, documents[2]?.verified]).toEqual([true, true]);
    expect(outcome.status).toBe(1);
    expect(linesOf(outcome.stderr)).toEqual([expect.stringMatching(/^thicken: ENOENT: .*; /)]);
  });

  test('of several targets exits with the highest status of all, wherever it came', async () => {
    const outcome = await cli(['allocate', '--json', '--offset', '2M', sparse(MIB), '/nonexistent/disk', sparse(4 * MIB)]);
    expect(outcome.status).toBe(2);
    expect(documentOf<Partial<Failure>[]>(outcome).map(({ error }) => error?.code)).toEqual(['RANGE', 'ENOENT', undefined]);
  });

  test('that is interrupted says what was done, with status 130', async () => {
    const path = sparse(64 * MIB);
    const args = ['allocate', '--json', '--preallocation', 'full', '--speed', '2M', '--progress', 'json', path];
    const running = spawnCli(args);
    await running.output('stderr', /"position":[1-9]/);
    running.kill('SIGINT');
    const outcome = await running.exit;
    const { target, error, done, ...rest } = documentOf<Failure>(outcome);
    expect([outcome.status, target, error.code, rest]).toEqual([130, path, 'CANCELLED', {}]);
    expect(done?.allocated).toBeGreaterThan(0);
    expect(done?.allocated).toBeLessThan(64 * MIB);
  });
});

describe('verify --json', () => {
  test('has the fields of the contract, and status 3 while something is missing', async () => {
    const path = await mixed();
    const outcome = await cli(['verify', '--json', path]);
    const verdict = documentOf<Verdict>(outcome);
    expect(keysOf(verdict)).toEqual(['missing', 'preallocation', 'satisfied', 'target', 'warnings']);
    expect(verdict).toMatchObject({ target: path, preallocation: 'falloc', satisfied: false, warnings: [] });
    for (const range of verdict.missing) expect(keysOf(range)).toEqual(['length', 'offset', 'why']);
    expect(verdict.missing.map(({ offset, length }) => [offset, length])).toEqual([
      [64 * KIB, 192 * KIB], [448 * KIB, 64 * KIB],
    ]);
    expect(outcome.status).toBe(3);
  });

  test('has status 0 when nothing is missing, at the level and in the range that are asked for', async () => {
    const path = await mixed();
    expect((await cli(['verify', '--json', '--length', '64k', '--preallocation', 'full', path])).status).toBe(0);
    await cli(['allocate', path]);
    expect((await cli(['verify', path])).status).toBe(0);
    expect((await cli(['verify', '--preallocation', 'full', path])).status).toBe(3);
  });
});

describe('an error', () => {
  const there = () => sparse(MIB);
  const folder = () => {
    const path = scratchPath('folder');
    mkdirSync(path);
    return path;
  };
  const fifo = () => {
    const path = scratchPath('fifo');
    execFileSync('mkfifo', [path]);
    return path;
  };
  const disguised = () => {
    const path = scratchPath('disk.raw');
    writeFileSync(path, Buffer.concat([Buffer.from('QFI\xfb', 'latin1'), Buffer.alloc(64 * KIB)]));
    return path;
  };

  const CASES: [status: number, code: string, args: () => string[]][] = [
    [1, 'ENOENT', () => ['info', '/nonexistent/disk']],
    [1, 'ENOENT', () => ['map', '/nonexistent/disk']],
    [1, 'ENOENT', () => ['verify', '/nonexistent/disk']],
    [1, 'ENOENT', () => ['allocate', '/nonexistent/disk']],
    [1, 'ENOENT', () => ['info', '']],
    [1, 'EISDIR', () => ['allocate', folder()]],
    [1, 'UNSUPPORTED', () => ['allocate', fifo()]],
    [1, 'UNSUPPORTED', () => ['info', '/dev/null']],
    [1, 'NBD_LOST', () => ['info', 'nbd+unix:///x?socket=/nonexistent/socket']],
    [2, 'USAGE', () => ['info', 'nbd://localhost:0/x']],
    [2, 'FORMAT_REQUIRED', () => ['allocate', disguised()]],
    [2, 'FORMAT_REQUIRED', () => ['verify', disguised()]],
    [2, 'RANGE', () => ['allocate', '--offset', '1M', '--length', '1', there()]],
    [2, 'RANGE', () => ['map', '--offset', '2M', there()]],
    [2, 'RANGE', () => ['map', '--output', 'bar', '--offset', '2M', there()]],
    [2, 'RANGE', () => ['verify', '--length', '2M', there()]],
    [2, 'USAGE', () => ['allocate', '--offset', '1X', there()]],
    [2, 'USAGE', () => ['allocate', '--offset=-1', there()]],
    [2, 'USAGE', () => ['allocate', '--offset', '-1', there()]],
    [2, 'USAGE', () => ['allocate', '--length', '1.5', there()]],
    [2, 'USAGE', () => ['allocate', '--length', 'NaN', there()]],
    [2, 'USAGE', () => ['allocate', '--length', '9007199254740992', there()]],
    [2, 'USAGE', () => ['allocate', '--speed', '0', there()]],
    [2, 'USAGE', () => ['allocate', '--iops', 'many', there()]],
    [2, 'USAGE', () => ['allocate', '--keep-free', '101%', there()]],
    [2, 'USAGE', () => ['allocate', '--preallocation', 'metadata', there()]],
    [2, 'USAGE', () => ['map']],
    [2, 'USAGE', () => ['map', '--device', 'disk0', there()]],
    [2, 'USAGE', () => ['allocate', '--nbd', 'nbd://localhost', there()]],
    [2, 'USAGE', () => ['verify', '--qmp', '/nonexistent/qmp', '--device', 'disk0', there()]],
    [2, 'USAGE', () => ['allocate', '--detach', there()]],
    [2, 'USAGE', () => ['allocate', '--preallocation', 'much', there()]],
    [2, 'USAGE', () => ['allocate', '--route', 'device', there()]],
    [2, 'USAGE', () => ['allocate', '--route', 'teleport', there()]],
    [2, 'USAGE', () => ['allocate', '--format', 'qcow3', there()]],
    [2, 'USAGE', () => ['allocate', '--frobnicate', there()]],
    [2, 'USAGE', () => ['allocate', '--progress', 'loud', there()]],
    [2, 'USAGE', () => ['allocate']],
    [2, 'USAGE', () => ['map', '--output', 'pdf', there()]],
    [2, 'USAGE', () => ['map', there(), there()]],
    [2, 'USAGE', () => ['frobnicate', there()]],
  ];

  test.each(CASES)('%d %s is one line on stderr, and changes nothing', async (status, code, args) => {
    const given = args();
    const outcome = await cli(given);
    expect(linesOf(outcome.stderr)).toEqual([expect.stringMatching(new RegExp(`^thicken: ${code}: .+; .+$`))]);
    expect([outcome.status, outcome.stdout]).toEqual([status, '']);
    const target = statSync(given.at(-1)!, { throwIfNoEntry: false });
    if (target?.isFile() && target.size === MIB) expect(target.blocks).toBe(0);
  });

  test.each(CASES)('%d %s with --json is one document on stdout too', async (status, code, args) => {
    const outcome = await cli([...args(), '--json']);
    const document = documentOf<Failure>(outcome);
    expect(document.error).toMatchObject({ code, message: expect.stringContaining('; ') });
    const allowed = ['code', 'message', 'errno', 'syscall', 'path', 'offset', 'length', 'needed', 'available'];
    expect(keysOf(document.error).filter((key) => !allowed.includes(key))).toEqual([]);
    expect(keysOf(document).filter((key) => key !== 'error' && key !== 'target')).toEqual([]);
    expect(outcome.status).toBe(status);
    expect(linesOf(outcome.stderr)).toHaveLength(1);
  });

  test.each([
    ['--frobnicate', '--progress', 'json'],
    ['--progress', 'json', '--offset', '1X'],
    ['--speed', '0', '--progress=json'],
    ['--progress', 'json', '--json', '--length', '-1'],
  ])('of usage is a line of JSON on stderr with --progress json (%s %s %s)', async (...options) => {
    const outcome = await cli(['allocate', ...options, there()]);
    const [line = '', ...more] = linesOf(outcome.stderr);
    const document = JSON.parse(line) as Failure;
    expect(document).toEqual({ error: expect.objectContaining({ code: 'USAGE', message: expect.any(String) }) });
    expect([outcome.status, more]).toEqual([2, []]);
    if (options.includes('--json')) expect(documentOf(outcome)).toEqual(document);
    else expect(outcome.stdout).toBe('');
  });

  test('without any command is USAGE', async () => {
    const outcome = await cli([]);
    expect(outcome.status).toBe(2);
    expect(linesOf(outcome.stderr)).toEqual([expect.stringMatching(/^thicken: USAGE: /)]);
  });

  test('names the range and the file', async () => {
    const path = there();
    const { error } = documentOf<Failure>(await cli(['map', '--json', '--offset', '1M', '--length', '1k', path]));
    expect(error).toMatchObject({ path, offset: MIB, length: KIB });
    expect(error.message).toContain(JSON.stringify(path));
  });

  test('because somebody has the file open for writing has status 4, and names the way out', async () => {
    const path = there();
    const child = start('bash', ['-c', 'exec 3<>"$1"; echo open; exec sleep 600', 'bash', path]);
    await child.output('stdout', /open/);
    const outcome = await cli(['allocate', '--json', '--preallocation', 'full', path]);
    await child.dispose();
    expect(outcome.status).toBe(4);
    expect(documentOf<Failure>(outcome).error).toMatchObject({ code: 'IN_USE', message: expect.stringContaining('--qmp') });
    expect(statSync(path).blocks).toBe(0);
  });
});

describe('a name with newlines and control characters', () => {
  const wild = 'a\nb\r\u001b[31mc\u0007.raw';

  test('leaves an error one line, without them', async () => {
    const outcome = await cli(['info', `/nonexistent/${wild}`]);
    expect(linesOf(outcome.stderr)).toHaveLength(1);
    expect(withoutNewlines(outcome.stderr)).not.toMatch(/\p{Cc}/u);
  });

  test('in an unknown command or option, too', async () => {
    for (const args of [[wild], ['info', `--${wild}`], ['info', '--format', wild, sparse(MIB)]]) {
      const { stderr } = await cli(args);
      expect(linesOf(stderr)).toHaveLength(1);
      expect(withoutNewlines(stderr)).not.toMatch(/\p{Cc}/u);
    }
  });

  test.each(['info', 'verify', 'allocate', 'allocate --dry-run'])('reaches no terminal by way of %s', async (command) => {
    const { stdout } = await cli([...command.split(' '), sparse(MIB, wild)]);
    expect(withoutNewlines(stdout)).not.toMatch(/\p{Cc}/u);
  });

  test('comes back from JSON as it was', async () => {
    const path = sparse(MIB, wild);
    expect(documentOf<AllocationResult>(await cli(['allocate', '--json', path])).target).toBe(path);
  });
});

const withoutNewlines = (text: string) => text.replaceAll('\n', '');

describe('allocate --progress json', () => {
  test('puts one JSON object a line on stderr, up to the end', async () => {
    const path = sparse(4 * MIB);
    const args = ['allocate', '--json', '--preallocation', 'full', '--speed', '8M', '--progress', 'json', path];
    const outcome = await cli(args);
    const lines = linesOf(outcome.stderr).map((line) => JSON.parse(line) as Progress & { target: string });
    expect(lines.length).toBeGreaterThan(2);
    let position = 0;
    for (const line of lines) {
      expect(keysOf(line)).toEqual(['paused', 'position', 'rate', 'route', 'secondsLeft', 'target', 'total']);
      expect(line).toMatchObject({ target: path, total: 4 * MIB, route: 'zero-write', paused: false });
      expect(line.position).toBeGreaterThanOrEqual(position);
      position = line.position;
    }
    expect(position).toBe(4 * MIB);
    expect(documentOf<AllocationResult>(outcome).verified).toBe(true);
  });

  test('says nothing with none, or where stderr is no terminal', async () => {
    expect((await cli(['allocate', '--progress', 'none', sparse(MIB)])).stderr).toBe('');
    expect((await cli(['allocate', sparse(MIB)])).stderr).toBe('');
  });
});

describe('map for people', () => {
  test('is a table with a line for each extent', async () => {
    const lines = linesOf((await cli(['map', await mixed()])).stdout);
    expect(lines).toHaveLength(1 + MIXED.length);
    expect(lines[0]).toMatch(/offset +length +host +guest/);
    expect(lines[2]!.trim().split(/\s+/)).toEqual([String(64 * KIB), String(192 * KIB), 'hole', 'zero']);
  });

  test('ends quietly when its reader has seen enough', async () => {
    const path = fragmented(20_000);
    const script = '"$0" "$1" map "$2" | head -1; echo "${PIPESTATUS[0]}"';
    const outcome = await run('bash', ['-c', script, process.execPath, cliMain, path]);
    expect(outcome.stderr).toBe('');
    expect(linesOf(outcome.stdout)).toEqual([expect.stringMatching(/offset/), '0']);
  });

  test.each([0, 1, 4096, MIB])('as svg is well-formed XML for an image of %d bytes', async (length) => {
    const outcome = await cli(['map', '--output', 'svg', sparse(length, `<a & "b'>.raw`)]);
    expect([outcome.status, outcome.stderr]).toEqual([0, '']);
    expectWellFormed(outcome.stdout);
    expect(outcome.stdout).not.toMatch(/NaN|undefined|Infinity/);
  });

  test('as svg names each state that the image has, and no other', async () => {
    const { stdout } = await cli(['map', '--output', 'svg', await mixed()]);
    expectWellFormed(stdout);
    for (const state of ['written 128 KiB', 'unwritten 128 KiB', 'hole 256 KiB']) expect(stdout).toContain(`>${state}<`);
    expect(stdout).not.toContain('>shared');
  });

  test('as svg is well-formed XML, whatever the name is', async () => {
    for (const name of ['a\nb\u0001.raw', `${'é'.repeat(100)}.raw`, `${'💾'.repeat(50)}x.raw`, `${'💾'.repeat(50)}xy.raw`, '\ufffe\uffff.raw']) {
      const { stdout } = await cli(['map', '--output', 'svg', sparse(MIB, name)]);
      expectWellFormed(stdout);
    }
  });

  test('as bar is 80 wide where there is no terminal, without colour', async () => {
    const { stdout } = await cli(['map', '--output', 'bar', await mixed()]);
    const [bar = '', legend] = linesOf(stdout);
    expect(bar).toMatch(/^[░▁-█]{80}$/);
    expect(legend).toContain('hole 256 KiB');
  });

  test('as bar draws each part in its place', async () => {
    const { stdout } = await cli(['map', '--output', 'bar', await mixed()]);
    expect(linesOf(stdout)[0]).toBe('█'.repeat(10) + '░'.repeat(30) + '█'.repeat(30) + '░'.repeat(10));
  });

  test.each([0, 1, 79, 4097])('as bar is as wide for an image of %d bytes', async (length) => {
    const { stdout, status } = await cli(['map', '--output', 'bar', sparse(length)]);
    expect(status).toBe(0);
    expect(linesOf(stdout)[0]).toBe('░'.repeat(80));
  });
});

describe.runIf(requires({ tools: ['script', 'stty'] }))('on a terminal', () => {
  /** What a program prints on a terminal of so many columns. */
  async function onTerminal(columns: number, args: string[], env: NodeJS.ProcessEnv = {}): Promise<string> {
    const quoted = [process.execPath, cliMain, ...args].map((arg) => `'${arg}'`).join(' ');
    const command = `stty cols ${columns} rows 24; ${quoted}`;
    const outcome = await run('script', ['-qec', command, '/dev/null'], {
      env: { TERM: 'xterm-256color', NO_COLOR: undefined, FORCE_COLOR: undefined, COLUMNS: undefined, ...env },
    });
    expect(outcome.status).toBe(0);
    return outcome.stdout.replaceAll('\r\n', '\n');
  }
  // eslint-disable-next-line no-control-regex -- what is looked for
  const STYLE = /\u001b\[[0-9;]*m/g;

  test.each([40, 100, 237])('%d columns wide, the bar is as wide, and coloured', async (columns) => {
    const text = await onTerminal(columns, ['map', '--output', 'bar', await mixed()]);
    expect(text).toMatch(STYLE);
    expect([...text.replace(STYLE, '').split('\n')[0]!]).toHaveLength(columns);
  });

  test.each([{ NO_COLOR: '1' }, { TERM: 'dumb' }])('no colour with %o', async (env) => {
    const path = await mixed();
    expect(await onTerminal(80, ['map', '--output', 'bar', path], env)).not.toMatch(STYLE);
    expect(await onTerminal(80, ['info', path], env)).not.toMatch(STYLE);
  });

  test('the progress bar is drawn on one line, and gone at the end', async () => {
    const args = ['allocate', '--preallocation', 'full', '--speed', '8M', sparse(4 * MIB)];
    const text = await onTerminal(120, args);
    expect(text).toMatch(/\d+%.*MiB.*\/s/);
    expect(text.split('\n').filter(Boolean)).toHaveLength(1);
  });

  test.runIf(requires({ tools: ['nbdkit'] }))('an interrupt adds no words to lines of JSON', async () => {
    await using server = await nbdkit(['--filter=delay', 'memory', '64M', 'delay-write=3', 'delay-zero=3']);
    const allocate = `exec '${process.execPath}' '${cliMain}' allocate --exclusive --preallocation full --progress json '${server.uri}'`;
    await using shown = start('script', ['-qec', `echo "pid $$."; ${allocate}`, '/dev/null']);
    const pid = Number((await shown.output('stdout', /pid (\d+)\./))[1]);
    await shown.output('stdout', /"position":[1-9]/);
    process.kill(pid, 'SIGINT');
    const { status, stdout } = await shown.exit;
    expect(status).toBe(130);
    expect(stdout).not.toMatch(/waits for/);
  });

  test.runIf(requires({ tools: ['nbdkit'] }))('an interrupt that has to wait says so, and the next leaves at once', async () => {
    await using server = await nbdkit(['--filter=delay', 'memory', '64M', 'delay-write=3', 'delay-zero=3']);
    const allocate = `exec '${process.execPath}' '${cliMain}' allocate --exclusive --preallocation full --speed 4M '${server.uri}'`;
    await using shown = start('script', ['-qec', `echo "pid $$."; ${allocate}`, '/dev/null']);
    const pid = Number((await shown.output('stdout', /pid (\d+)\./))[1]);
    await shown.output('stdout', /MiB\/s/);
    process.kill(pid, 'SIGINT');
    await shown.output('stdout', /waits for what is under way.*once more/, { timeout: 2_500 });
    expect(shown.child.exitCode).toBe(null);
    process.kill(pid, 'SIGINT');
    const { status, stdout } = await shown.exit;
    expect(status).toBe(130);
    expect(stdout.lastIndexOf('\u001b[?25h'), 'the cursor is shown').toBeGreaterThan(stdout.lastIndexOf('\u001b[?25l'));
  });
});

describe('output that nobody reads', () => {
  /** The status of thicken with its output redirected by a shell. */
  async function statusWith(redirection: string, args: string[]): Promise<number> {
    const script = `set -o pipefail; "$0" "$@" ${redirection}; echo "status $?" >&2`;
    const outcome = await run('bash', ['-c', script, process.execPath, cliMain, ...args], { timeout: 30_000 });
    return Number(/status (\d+)\n$/.exec(outcome.stderr)?.[1]);
  }
  const allocated = (path: string) => statSync(path).blocks * 512 === statSync(path).size;

  test.each(['| true', '2>&1 | true', '2> >(true) | true'])('ends no work of allocate (%s)', async (redirection) => {
    for (const options of [[], ['--json'], ['--progress', 'json']]) {
      const paths = [sparse(MIB), sparse(MIB), sparse(MIB)];
      expect(await statusWith(redirection, ['allocate', ...options, ...paths])).toBe(0);
      expect(paths.map(allocated)).toEqual([true, true, true]);
    }
  });

  test('on stderr alone ends no work of allocate', async () => {
    const paths = [sparse(4 * MIB), sparse(MIB)];
    const args = ['--preallocation', 'full', '--speed', '16M', '--progress', 'json'];
    expect(await statusWith('2> >(true)', ['allocate', ...args, ...paths])).toBe(0);
    expect(paths.map(allocated)).toEqual([true, true]);
  });

  test('leaves allocate the status that its work deserves', async () => {
    const paths = [sparse(MIB), '/nonexistent/disk', sparse(MIB)];
    for (const options of [[], ['--json']]) {
      expect(await statusWith('2>/dev/null | true', ['allocate', ...options, ...paths])).toBe(1);
    }
    expect([allocated(paths[0]!), allocated(paths[2]!)]).toEqual([true, true]);
  });

  test.each(['', '--json'])('leaves verify its verdict %s', async (option) => {
    const options = option === '' ? [] : [option];
    const path = sparse(MIB);
    expect(await statusWith('| true', ['verify', ...options, path])).toBe(3);
    await cli(['allocate', path]);
    expect(await statusWith('| true', ['verify', ...options, path])).toBe(0);
    expect(await statusWith('| true', ['verify', ...options, '/nonexistent/disk'])).toBe(1);
  });

  test.each(['info', 'map', 'map --json', 'map --output svg'])('ends %s quietly', async (command) => {
    expect(await statusWith('| true', [...command.split(' '), fragmented(2000)])).toBe(0);
  });

  test('is an error where the disk under it is full, yet ends no work of allocate', async () => {
    const paths = [sparse(MIB), sparse(MIB)];
    for (const command of [['allocate', ...paths], ['map', paths[0]!], ['info', paths[0]!]]) {
      const outcome = await run('bash', ['-c', '"$0" "$@" > /dev/full', process.execPath, cliMain, ...command]);
      expect(outcome.status).toBe(1);
      expect(linesOf(outcome.stderr)).toEqual([expect.stringMatching(/^thicken: ENOSPC: .*stdout/)]);
    }
    expect(paths.map(allocated)).toEqual([true, true]);
  });
});

test('--version and --help print to stdout, with status 0', async () => {
  const version = await cli(['--version']);
  expect([version.status, version.stderr]).toEqual([0, '']);
  expect(version.stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
  for (const args of [['--help'], ['allocate', '--help'], ['help', 'map']]) {
    const help = await cli(args);
    expect([help.status, help.stderr]).toEqual([0, '']);
    expect(help.stdout).toMatch(/^Usage: thicken/);
  }
});

/** A file of so many blocks of data, a hole after each. */
function fragmented(blocks: number): string {
  const path = scratchPath('fragmented.raw');
  const descriptor = openSync(path, 'w');
  ftruncateSync(descriptor, blocks * 8192);
  const block = Buffer.alloc(4096, 1);
  for (let i = 0; i < blocks; i++) writeSync(descriptor, block, 0, 4096, i * 8192);
  closeSync(descriptor);
  return path;
}

/** Tags that balance, attributes that are quoted, and no character that XML forbids. */
function expectWellFormed(xml: string): void {
  // eslint-disable-next-line no-control-regex -- what is looked for
  expect(xml).not.toMatch(/[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]|\ufffd/);
  const tag = /<(\/?)([a-z]+)((?:\s+[a-zA-Z:-]+="[^"<&]*(?:&(?:amp|lt|gt|quot|apos);[^"<&]*)*")*)\s*(\/?)>/g;
  const open: string[] = [];
  let roots = 0;
  for (const [, closing, name = '', , empty] of xml.matchAll(tag)) {
    if (closing) expect(open.pop()).toBe(name);
    else {
      if (open.length === 0) roots++;
      if (!empty) open.push(name);
    }
  }
  expect([open, roots]).toEqual([[], 1]);
  expect(xml.replace(tag, '')).not.toMatch(/[<>]|&(?!(amp|lt|gt|quot|apos);)/);
}
