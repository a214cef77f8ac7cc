/** Images at rest in formats that QEMU alone writes. */
import { setTimeout as sleep } from 'node:timers/promises';
import { tmpdir } from 'node:os';
import { describe, expect, it } from 'vitest';
import type { ImageInfo, Verdict } from '../../lib/types.js';
import { cliJson, holdOpen, MiB, missing, soak, startAllocation, type Refusal } from '../storage/helpers.js';
import { qemuCompare, qemuMap } from '../support/judges.js';
import { random } from '../support/patterns.js';
import { mustRun, run, spawnCli, startQemu } from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { allocate, LEAKS } from './disks.js';
import { daemonsIn, expectNothingLeft, withDaemon } from './helpers.js';

const runnable = withDaemon && requires({ tools: ['filefrag'] });
const SIZE = 24 * MiB;
const kills = soak ? 60 : 1;

interface Format {
  name: string;
  options?: string;
  /** Bytes of a cluster. */
  cluster: number;
  /** Whether QEMU tells what is mapped. */
  tells: boolean;
  /** Whether QEMU can check it. */
  checks: boolean;
  /** Whether a QEMU that is killed may leave an image that QEMU does not write to any more (7.2). */
  frail?: boolean;
  /** Whether what such a QEMU leaked stays so: no check frees it. */
  leaks?: boolean;
}

const FORMATS: Format[] = [
  { name: 'qed', cluster: 65536, tells: true, checks: true, leaks: true },
  { name: 'vmdk', cluster: 65536, tells: true, checks: true },
  { name: 'vdi', cluster: MiB, tells: true, checks: true },
  { name: 'vhdx', options: 'block_size=1M', cluster: MiB, tells: false, checks: true, frail: true },
  { name: 'vpc', options: 'force_size=on', cluster: 2 * MiB, tells: true, checks: false },
  { name: 'parallels', cluster: MiB, tells: true, checks: true },
];

/** Some data at odd places, and some that is known to be zeros; a copy of what is read. */
async function makeImage({ name, options }: Format): Promise<{ path: string; copy: string }> {
  const path = scratchPath(`image.${name}`);
  await mustRun('qemu-img', ['create', '-q', '-f', name, ...(options ? ['-o', options] : []), path, String(SIZE)]);
  const writes = ['write -q -P 7 1100k 70k', 'write -q -P 8 9M 512', 'write -q -z 4M 3M', 'write -q -P 9 12287k 5k', 'write -q -P 0 15M 1k'];
  await qemuIo(path, name, ...writes);
  const copy = scratchPath('copy.raw');
  await mustRun('qemu-img', ['convert', '-f', name, '-O', 'raw', path, copy]);
  return { path, copy };
}

async function expectSound({ name, checks }: Format, path: string, copy: string, sound = [0]): Promise<void> {
  expect(await qemuCompare(path, copy, { formatA: name }), `${path} reads as before`).toBe(true);
  if (!checks) return;
  const { status, stdout, stderr } = await run('qemu-img', ['check', '-f', name, path]);
  expect(sound, stdout + stderr).toContain(status);
}

/** Bytes of a range that QEMU's map finds no storage for. */
async function unmapped({ name }: Format, path: string, from: number, to: number): Promise<number> {
  let bytes = 0;
  for (const { start, length, present, data } of await qemuMap(path, name)) {
    if (present && data) continue;
    bytes += Math.max(0, Math.min(to, start + length) - Math.max(from, start));
  }
  return bytes;
}

function ranges(seed: number): { range: [number, number] }[] {
  const next = random(seed);
  return [
    { range: [0, SIZE] },
    ...Array.from({ length: soak ? 3 : 1 }, (): { range: [number, number] } => {
      const offset = next() % (SIZE - 1);
      return { range: [offset, 1 + (next() % (SIZE - offset))] };
    }),
  ];
}

describe.runIf(runnable).each(FORMATS)('$name', (format) => {
  const { name, cluster, tells } = format;

  it.each(ranges(name.charCodeAt(1)))('is mapped and backed in range $range', { timeout: 120_000 }, async ({ range: [offset, length] }) => {
    const from = offset - (offset % cluster);
    const to = Math.min(SIZE, Math.ceil((offset + length) / cluster) * cluster);
    for (const level of ['metadata', 'falloc', 'full']) {
      const { path, copy } = await makeImage(format);
      const before = await unmapped(format, path, 0, from) + await unmapped(format, path, to, SIZE);
      const result = await allocate(path, '--format', name, '--preallocation', level, '--offset', String(offset), '--length', String(length));
      expect(result).toMatchObject({ format: name, effective: { offset: from, length: to - from }, verified: tells ? true : null });
      expect(result.guarantee).toBe(tells && level !== 'metadata');
      await expectSound(format, path, copy);
      expect(await unmapped(format, path, from, to)).toBe(0);
      // Nothing beside the range was mapped.
      expect(await unmapped(format, path, 0, from) + await unmapped(format, path, to, SIZE)).toBe(before);
      if (level !== 'metadata') expect(await missing(path, level as 'falloc' | 'full')).toEqual([]);
      const again = await allocate(path, '--format', name, '--preallocation', level, '--offset', String(offset), '--length', String(length));
      if (tells) expect(again.plan).toEqual([]);
      const verdict = await cliJson<Verdict>(['verify', path, '--format', name, '--preallocation', level, '--offset', String(offset), '--length', String(length)]);
      expect(verdict.status).toBe(tells ? 0 : 3);
    }
  });

  it('is told of by info, and named by its suffix', async () => {
    const { path } = await makeImage(format);
    const info = await cliJson<ImageInfo>(['info', '--format', name, path]);
    expect(info.status, info.stderr).toBe(0);
    expect(info.document).toMatchObject({ kind: 'file', format: name, formatBy: 'option', virtualSize: SIZE, granularity: cluster, inUse: null });
    const lacks = await unmapped(format, path, 0, SIZE);
    if (tells) expect(info.document).toMatchObject({ missing: lacks, allocated: SIZE - lacks });
    else expect(info.document).toMatchObject({ missing: null, allocated: null });
    const verdict = await cliJson<Verdict>(['verify', path, '--format', name]);
    expect(verdict.status).toBe(3);
    const suffix = name === 'parallels' ? 'hdd' : name;
    await mustRun('cp', [path, `${path}.${suffix}`]);
    expect((await cliJson<ImageInfo>(['info', `${path}.${suffix}`])).document).toMatchObject({ format: name, formatBy: 'suffix', granularity: cluster });
  });

  it('is left alone where somebody has it open', async () => {
    const { path, copy } = await makeImage(format);
    {
      await using _qemu = await startQemu({ file: path, format: name });
      const outcome = await cliJson<Refusal>(['allocate', '--format', name, path]);
      expect(outcome.status).toBe(4);
      expect(outcome.document.error.code).toBe('IN_USE');
      expect(outcome.document.error.message).toMatch(/qemu-storage-daemon|qemu-storage-da/);
    }
    {
      // What knows nothing of QEMU's locks.
      await using _writer = await holdOpen(path);
      expect((await cliJson<Refusal>(['allocate', '--format', name, path])).status).toBe(4);
    }
    expect(await qemuCompare(path, copy, { formatA: name })).toBe(true);
    // The one that had it open was killed, which Parallels counts as damage.
    if (format.checks) await run('qemu-img', ['check', '-q', '-r', 'all', '-f', name, path]);
    await allocate(path, '--format', name);
    await expectSound(format, path, copy);
  });

  it('survives kill -9 at any moment, of thicken and of the daemon', { timeout: kills * 60_000 }, async () => {
    const next = random(name.charCodeAt(0));
    const sound = format.leaks ? [0, LEAKS] : [0];
    for (let i = 0; i < kills * 2; i++) {
      const { path, copy } = await makeImage(format);
      const args = ['allocate', path, '--format', name, '--preallocation', 'full'];
      await using killed = await startAllocation(spawnCli([...args, '--speed', '8M', '--progress', 'json']));
      await sleep(next() % 1000);
      if (i % 2 === 0) killed.kill('SIGKILL');
      else for (const pid of daemonsIn(tmpdir())) process.kill(pid, 'SIGKILL');
      const { status, signal, stderr } = await killed.exit;
      expect(signal === 'SIGKILL' || status !== null, stderr).toBe(true);
      await expectNothingLeft();
      // QEMU replays what its own logs hold, or frees what leaked, when it opens the image for writing.
      if (format.checks) await run('qemu-img', ['check', '-q', '-r', 'all', '-f', name, path]);
      await expectSound(format, path, copy, sound);
      if (format.frail && i % 2 === 1 && (await isStuck(path, name))) continue;
      expect(await allocate(path, '--format', name, '--preallocation', 'full')).toMatchObject({ verified: tells ? true : null });
      await expectSound(format, path, copy, sound);
      expect(await missing(path, 'full')).toEqual([]);
    }
  });
});

describe.runIf(runnable)('VMDK over VMDK', () => {
  it('gets all from below, and zeros that hide it stay zeros; it keeps its backing file', async () => {
    const [base, path, copy] = [scratchPath('base.vmdk'), scratchPath('image.vmdk'), scratchPath('copy.raw')];
    await mustRun('qemu-img', ['create', '-q', '-f', 'vmdk', base, String(SIZE)]);
    await qemuIo(base, 'vmdk', 'write -q -P 7 1M 2M', 'write -q -P 4 9M 100k');
    await mustRun('qemu-img', ['create', '-q', '-f', 'vmdk', '-b', base, '-F', 'vmdk', '-o', 'zeroed_grain=on', path]);
    await qemuIo(path, 'vmdk', 'write -q -z 1M 256k', 'write -q -P 3 5M 10k');
    await mustRun('qemu-img', ['convert', '-f', 'vmdk', '-O', 'raw', path, copy]);
    const refused = await cliJson<Refusal>(['allocate', '--format', 'vmdk', '--drop-backing', path]);
    expect([refused.status, refused.document.error.code]).toEqual([1, 'UNSUPPORTED']);
    // By its suffix alone nothing below is opened.
    expect((await cliJson<Refusal>(['allocate', path])).document.error.code).toBe('UNSUPPORTED');
    const result = await allocate(path, '--format', 'vmdk');
    expect(result.plan.map(({ route }) => route)).toEqual(expect.arrayContaining(['populate', 'nbd-write', 'fallocate']));
    expect(result).toMatchObject({ verified: true, guarantee: true, after: { allocated: SIZE } });
    await expectSound(FORMATS[1]!, path, copy);
    expect((await qemuMap(path, 'vmdk')).every(({ depth, data }) => depth === 0 && data)).toBe(true);
    expect(await missing(path, 'falloc')).toEqual([]);
  });
});

/** QEMU had opened the image's log, and written nothing to it yet: it reads the image, and no more. */
async function isStuck(path: string, name: string): Promise<boolean> {
  const outcome = await cliJson<Refusal>(['allocate', path, '--format', name]);
  if (outcome.status === 0) return false;
  expect(outcome.document.error.code, outcome.stderr).toBe('ENOTSUP');
  const { status } = await run('qemu-io', ['-f', name, '-c', 'write -P 0 20M 1k', path]);
  expect(status).not.toBe(0);
  return true;
}

describe.runIf(runnable)('what can’t be given storage is refused by name', () => {
  it.each([
    ['vmdk', 'subformat=streamOptimized', 'UNSUPPORTED', /streamOptimized/],
    ['vmdk', 'subformat=monolithicFlat', 'UNSUPPORTED', /other files/],
    ['vmdk', 'subformat=twoGbMaxExtentSparse', 'UNSUPPORTED', /other files/],
    ['vpc', 'subformat=fixed', 'UNSUPPORTED', /--format raw/],
  ])('%s, %s', async (name, options, code, words) => {
    const path = scratchPath(`refused.${name}`);
    await mustRun('qemu-img', ['create', '-q', '-f', name, '-o', options, path, '8M']);
    const outcome = await cliJson<Refusal>(['allocate', '--format', name, path]);
    expect(outcome.status).toBe(1);
    expect(outcome.document.error).toMatchObject({ code, message: expect.stringMatching(words) });
    expect(daemonsIn(tmpdir())).toEqual([]);
  });

  it('a header alone speaks for no format', async () => {
    const path = scratchPath('disk.raw');
    await mustRun('qemu-img', ['create', '-q', '-f', 'vdi', path, '8M']);
    expect((await cliJson<Refusal>(['allocate', path])).document.error.code).toBe('FORMAT_REQUIRED');
  });

  it('a header that is none', async () => {
    const path = scratchPath('disk.vdi');
    await mustRun('truncate', ['-s', '8M', path]);
    const outcome = await cliJson<Refusal>(['allocate', '--format', 'vdi', path]);
    expect(outcome.status).toBe(1);
    expect(outcome.document.error.code).toBe('QEMU_REFUSED');
  });
});
