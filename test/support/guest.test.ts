import { closeSync, openSync, readSync, rmSync, truncateSync, writeFileSync, writeSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { mountFilesystem } from './filesystems.js';
import { BLOCK, expectedImage, makeTemplate, parseDump, UNKNOWN } from './guest-content.js';
import { startGuest, type Guest, type Report } from './guest.js';
import { hostBytes, qemuCompare } from './judges.js';
import { mustRun } from './processes.js';
import { requires } from './requirements.js';
import { scratchPath } from './scratch.js';
import { waitFor } from './wait.js';

const KiB = 1024;
const MiB = 1024 * KiB;
const size = 32 * MiB;
const long = { timeout: 100_000, interval: 100 };

function sparseFile(path = scratchPath('disk.raw'), length = size): string {
  writeFileSync(path, '');
  truncateSync(path, length);
  return path;
}

function bytesAt(path: string, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  withFile(path, (descriptor) => expect(readSync(descriptor, bytes, 0, length, offset)).toBe(length));
  return bytes;
}

function overwrite(path: string, offset: number, bytes: Buffer): void {
  withFile(path, (descriptor) => writeSync(descriptor, bytes, 0, bytes.length, offset));
}

function withFile(path: string, use: (descriptor: number) => void): void {
  const descriptor = openSync(path, 'r+');
  try {
    use(descriptor);
  } finally {
    closeSync(descriptor);
  }
}

function expectGood(report: Report): void {
  expect(report).toMatchObject({ errors: 0, unknown: 0 });
  expect(report.blocks).toBeGreaterThan(0);
}

/** Waits for `done` to hold of what a running churn has to tell. */
function churned(guest: Guest, done: (report: Report) => boolean): Promise<Report> {
  return waitFor('the churn', async () => {
    const report = await guest.ask('status');
    return done(report) && report;
  }, long);
}

interface QmpMessage {
  event?: string;
  return?: unknown;
  data?: { reason?: string };
}

/** Runs one command at a monitor, and gives the first message that `wanted` takes. */
function qmp(socket: string, execute: string, wanted: (message: QmpMessage) => boolean): Promise<QmpMessage> {
  return new Promise((resolve, reject) => {
    const connection = createConnection(socket);
    let text = '';
    connection.once('error', reject).once('close', () => reject(new Error(`${socket} closed`)));
    connection.setEncoding('utf8').on('data', (chunk: string) => {
      const lines = (text + chunk).split('\n');
      text = lines.pop() ?? '';
      const found = lines.map((line) => JSON.parse(line) as QmpMessage).find(wanted);
      if (!found) return;
      resolve(found);
      connection.destroy();
    });
    connection.write(`{"execute":"qmp_capabilities"}{"execute":"${execute}"}\n`);
  });
}

function isAnswer(message: QmpMessage): boolean {
  return message.return !== undefined && JSON.stringify(message.return) !== '{}';
}

describe('parseDump', () => {
  it('gives the generation of each block', () => {
    expect([...parseDump('2x0 1xffffffff 3xa')]).toEqual([0, 0, UNKNOWN, 10, 10, 10]);
    expect(() => parseDump('2x0 nonsense')).toThrow('nonsense');
  });
});

describe('a template', () => {
  it('holds data and holes in turn', async () => {
    const path = scratchPath('template');
    const base = makeTemplate(path, { size: 4 * MiB, seed: 7, region: 64 * KiB });
    expect(base).toEqual({ seed: 7, region: 64 * KiB, length: 4 * MiB });
    expect(await hostBytes(path)).toBe(2 * MiB);
    const word = (offset: number) => bytesAt(path, offset, 8).readBigUInt64LE();
    expect(word(0)).toBe(0n);
    expect(word(64 * KiB)).not.toBe(0n);
    expect(word(64 * KiB)).not.toBe(word(64 * KiB + 512));
    expect(word(128 * KiB)).toBe(0n);
  });

  it('differs by its seed, and by what was written since', async () => {
    const [a, b] = [scratchPath('a'), scratchPath('b')];
    const base = makeTemplate(a, { size: MiB, seed: 1 });
    makeTemplate(b, { size: MiB, seed: 2 });
    expect(await qemuCompare(a, b)).toBe(false);
    expectedImage(b, MiB, base, []);
    expect(await qemuCompare(a, b)).toBe(true);
    expectedImage(b, MiB, base, [0, 0, 5]);
    expect(await qemuCompare(a, b)).toBe(false);
    expect(() => expectedImage(b, 1000, null, [])).toThrow(RangeError);
  });
});

describe.runIf(requires({ guest: true }))('a guest', () => {
  it('boots, finds its disks, and powers off', async () => {
    const [first, second] = [sparseFile(), sparseFile(undefined, 8 * MiB)];
    await using guest = await startGuest({
      disks: [
        { id: 'disk0', nodeName: 'first', file: first, cacheDirect: true, discard: 'unmap' },
        { id: 'disk1', file: second, driveOnly: true },
      ],
    });
    expect(await guest.waitReady()).toEqual({ vda: size, vdb: 8 * MiB });
    const monitors = [guest.qmpSocket, guest.spareQmp];
    const [blocks, again] = await Promise.all(monitors.map((path) => qmp(path, 'query-block', isAnswer)));
    expect(blocks!.return).toEqual(again!.return);
    const disks = blocks!.return as { qdev: string }[];
    // QEMU lists drives before nodes.
    expect(disks.sort((x, y) => x.qdev.localeCompare(y.qdev))).toMatchObject([
      { qdev: expect.stringContaining('/disk0/'), inserted: { 'node-name': 'first', file: first } },
      { device: 'drive-disk1', inserted: { 'node-name': expect.stringMatching(/^#block/), file: second } },
    ]);
    expect(disks[0]).toMatchObject({ inserted: { cache: { direct: true } } });
    expect(await guest.command('sh echo "a\\\\b"; ls /sys/block; exit 3')).toBe('3 a\\\\b\\nvda\\nvdb\\n');
    expect(await guest.powerOff()).toMatchObject({ status: 0, stderr: '' });
    expect(guest.console()).toContain('Power down');
  });

  it('finds what it wrote, as does the host', async () => {
    const [raw, qcow2] = [sparseFile(), scratchPath('disk.qcow2')];
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', qcow2, String(size)]);
    await using guest = await startGuest({
      disks: [
        { id: 'disk0', file: raw },
        { id: 'disk1', file: qcow2, format: 'qcow2' },
      ],
    });
    expectGood(await guest.ask('verify'));
    expect(await guest.ask('fill 1')).toMatchObject({ bytes: size });
    const first = await guest.generations();
    expectGood(await guest.ask('verify'));
    await guest.command('use vdb');
    await guest.command(`fill 2 ${12 * KiB} ${3 * MiB}`);
    await guest.command(`fill 2 ${3 * MiB} ${64 * KiB}`);
    expectGood(await guest.ask('verify'));
    const second = await guest.generations();
    await guest.powerOff();
    for (const [file, format, generations] of [[raw, 'raw', first], [qcow2, 'qcow2', second]] as const) {
      const expected = scratchPath('expected');
      expectedImage(expected, size, null, generations);
      expect(await qemuCompare(file, expected, { formatA: format })).toBe(true);
    }
    expect(await qemuCompare(raw, qcow2, { formatB: 'qcow2' })).toBe(false);
  });

  it('churns over a template that is shorter than the disk', async () => {
    const [template, disk] = [scratchPath('template'), scratchPath('disk.qcow2')];
    const base = makeTemplate(template, { size: 20 * MiB, seed: 3 });
    const backing = ['-b', template, '-F', 'raw'];
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', ...backing, disk, String(size)]);
    await using guest = await startGuest({ disks: [{ id: 'disk0', file: disk, format: 'qcow2' }] });
    // Without knowing of the template, what it holds must be wrong.
    const wrong = await guest.ask('verify');
    expect(wrong).toMatchObject({ blocks: size / BLOCK, first: base.region });
    expect(wrong.errors! * BLOCK).toBe(Math.floor((20 * MiB) / (2 * base.region)) * base.region);
    await guest.base(base);
    expectGood(await guest.ask('verify'));
    await guest.command('churn 5 4');
    await expect(guest.command('verify')).rejects.toThrow('a churn runs');
    await churned(guest, ({ writes, reads }) => writes! >= 500 && reads! >= 100);
    const report = await guest.ask('stop');
    expect(report).toMatchObject({ running: 0, errors: 0, failed: 0 });
    expect(report.p50).toBeGreaterThan(0);
    expect(report.p99).toBeGreaterThanOrEqual(report.p50!);
    expect(report.max).toBeGreaterThanOrEqual(report.p99!);
    expectGood(await guest.ask('verify'));
    const generations = await guest.generations();
    expect(new Set(generations).size).toBeGreaterThan(100);
    await guest.powerOff();
    const expected = scratchPath('expected');
    expectedImage(expected, size, base, generations);
    expect(await qemuCompare(disk, expected, { formatA: 'qcow2' })).toBe(true);
  });

  it('notices what was changed behind its back', async () => {
    const file = sparseFile();
    await using guest = await startGuest({ disks: [{ id: 'disk0', file }] });
    await guest.command('fill 1');
    const [flipped, stale, moved, emptied] = [5 * BLOCK, 9 * MiB, 17 * MiB, size - BLOCK] as const;
    const old = bytesAt(file, stale, BLOCK);
    await guest.command('fill 1');
    expectGood(await guest.ask('verify'));
    const good = bytesAt(file, flipped, BLOCK);
    const bad = Buffer.from(good);
    bad[BLOCK - 1]! ^= 1;
    overwrite(file, flipped, bad);
    expect(await guest.ask('verify')).toMatchObject({ errors: 1, first: flipped });
    expect(guest.console()).toContain(`block at ${flipped} is wrong`);
    overwrite(file, stale, old);
    overwrite(file, moved, bytesAt(file, moved + BLOCK, BLOCK));
    overwrite(file, emptied, Buffer.alloc(BLOCK));
    expect(await guest.ask('verify')).toMatchObject({ errors: 4 });
    expect(await guest.ask(`verify ${moved} ${BLOCK}`)).toMatchObject({ blocks: 1, errors: 1 });
    overwrite(file, flipped, good);
    expect(await guest.ask('verify')).toMatchObject({ errors: 3, first: stale });
    const expected = scratchPath('expected');
    expectedImage(expected, size, null, await guest.generations());
    expect(await qemuCompare(file, expected)).toBe(false);
  });

  it('notices it while it churns, too', async () => {
    const file = sparseFile();
    await using guest = await startGuest({ disks: [{ id: 'disk0', file }], machine: 'pc' });
    await guest.command('fill 1');
    await guest.command('churn 1 2');
    expect(await churned(guest, ({ reads }) => reads! > 10)).toMatchObject({ errors: 0 });
    overwrite(file, 0, Buffer.alloc(size));
    await churned(guest, ({ errors }) => errors! > 0);
    expect(await guest.ask('stop')).toMatchObject({ first: expect.any(Number) });
  });

  it('measures how long its writes take', async () => {
    await using guest = await startGuest({ disks: [{ id: 'disk0', file: sparseFile() }] });
    const report = await guest.ask(`latency 1 ${MiB} ${MiB}`);
    expect(report).toMatchObject({ failed: 0 });
    expect(report.count).toBeGreaterThan(0);
    expect(report.max).toBeGreaterThanOrEqual(report.p50!);
    const generations = await guest.generations();
    const places = [...generations.keys()].filter((block) => generations[block] !== 0);
    expect(places.length).toBeGreaterThan(0);
    expect(places.filter((block) => block < MiB / BLOCK || block >= (2 * MiB) / BLOCK)).toEqual([]);
    expectGood(await guest.ask('verify'));
  });

  it('does not vouch for what it has discarded', async () => {
    const file = sparseFile();
    await using guest = await startGuest({ disks: [{ id: 'disk0', file, discard: 'unmap' }] });
    await guest.command('fill 1');
    await guest.command('flush');
    expect(await hostBytes(file)).toBeGreaterThanOrEqual(size);
    await guest.command(`discard ${MiB} ${2 * MiB}`);
    expect(await guest.ask('verify')).toMatchObject({ errors: 0, unknown: (2 * MiB) / BLOCK });
    expect(await hostBytes(file)).toBeLessThan(size);
    const generations = await guest.generations();
    expect(generations[MiB / BLOCK]).toBe(UNKNOWN);
    expect(() => expectedImage(scratchPath(), size, null, generations)).toThrow(`the block at ${MiB} `);
  });

  it('refuses what it does not understand', async () => {
    await using guest = await startGuest({ disks: [{ id: 'disk0', file: sparseFile() }] });
    for (const line of ['', 'nonsense', 'use vdz', 'fill', 'fill 1 0', 'fill 1 512 4096', 'verify 0 0',
      `verify ${size} ${BLOCK}`, 'churn', 'churn 1 33', 'base 1 1000 4096', 'latency']) {
      await expect(guest.command(line), line).rejects.toThrow(`on "${line}": error `);
    }
    await expect(guest.command('verify\nverify')).rejects.toThrow('more than one line');
    expectGood(await guest.ask('verify'));
  });

  it('fails whoever waits for it when QEMU ends', async () => {
    await using guest = await startGuest({ disks: [{ id: 'disk0', file: sparseFile() }] });
    await guest.waitReady();
    const answer = expect(guest.command('latency 1000')).rejects.toThrow('ended');
    guest.kill('SIGKILL');
    await answer;
    expect(await guest.exit).toMatchObject({ signal: 'SIGKILL' });
    await expect(guest.command('verify')).rejects.toThrow('ended');
  });

  it('is not there if QEMU can not open a disk', async () => {
    const disks = [{ id: 'disk0', file: '/nonexistent' }];
    await expect(startGuest({ disks })).rejects.toThrow(/QEMU ended: .*nonexistent/);
  });
});

describe.runIf(requires({ guest: true, root: true }))('a guest without space', () => {
  it('is stopped by QEMU, and goes on when there is some', async () => {
    await using filesystem = await mountFilesystem({ type: 'tmpfs', size: 16 * MiB });
    const ballast = join(filesystem.path, 'ballast');
    writeFileSync(ballast, Buffer.alloc(12 * MiB));
    const file = sparseFile(join(filesystem.path, 'disk.raw'), 8 * MiB);
    await using guest = await startGuest({ disks: [{ id: 'disk0', file }] });
    await guest.waitReady();
    const stopped = qmp(guest.qmpSocket, 'query-status', ({ event }) => event === 'STOP');
    const filled = guest.ask('fill 1');
    await stopped;
    const status = await qmp(guest.qmpSocket, 'query-status', isAnswer);
    expect(status.return).toMatchObject({ running: false, status: 'io-error' });
    rmSync(ballast);
    await qmp(guest.qmpSocket, 'cont', ({ event }) => event === 'RESUME');
    expect(await filled).toMatchObject({ bytes: 8 * MiB });
    expectGood(await guest.ask('verify'));
  });

  it('is told so, if that is what was asked for', async () => {
    await using filesystem = await mountFilesystem({ type: 'tmpfs', size: 4 * MiB });
    const file = sparseFile(join(filesystem.path, 'disk.raw'), 8 * MiB);
    await using guest = await startGuest({
      disks: [{ id: 'disk0', file, deviceOptions: { werror: 'report' } }],
    });
    await expect(guest.command('fill 1')).rejects.toThrow('Input/output error');
    const report = await guest.ask('verify');
    expect(report).toMatchObject({ errors: 0, unknown: MiB / BLOCK });
    await guest.command('churn 2');
    await churned(guest, ({ failed }) => failed! > 0);
    expect(await guest.ask('stop')).toMatchObject({ errors: 0 });
    expect(await guest.ask('verify')).toMatchObject({ errors: 0 });
  });
});
