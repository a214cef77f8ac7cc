import { writeFileSync } from 'node:fs';
import { stat, unlink } from 'node:fs/promises';
import { describe, expect, it } from 'vitest';
import type { AllocationResult, Verdict } from '../../lib/types.js';
import { hostBytes } from '../support/judges.js';
import { cliJson, EXT4, MiB, TMPFS, TOOLS } from '../storage/helpers.js';
import { mountFilesystem } from '../support/filesystems.js';
import { startGuest, type Guest } from '../support/guest.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';

const runnable = requires({ root: true, loop: true, guest: true, tools: [...TOOLS, 'qemu-system-x86_64'] });
const size = 64 * MiB;

/** Takes all that the file system has left. */
function fill(folder: string): void {
  const chunk = Buffer.alloc(MiB, 0x5a);
  for (let i = 0; ; i++) {
    try {
      writeFileSync(`${folder}/neighbour-${i}`, chunk);
    } catch (error) {
      expect((error as NodeJS.ErrnoException).code).toBe('ENOSPC');
      return;
    }
  }
}

async function withGuest(reserved: boolean, body: (guest: Guest, file: string) => Promise<void>): Promise<void> {
  await using mounted = await mountFilesystem({ ...EXT4, size: 256 * MiB });
  const file = `${mounted.path}/disk.qcow2`;
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file, String(size)]);
  await using guest = await startGuest({ disks: [{ id: 'disk0', file, format: 'qcow2' }] });
  const args = ['--qmp', guest.qmpSocket, '--device', 'disk0'];
  if (reserved) {
    const { document } = await cliJson<AllocationResult>(['allocate', ...args]);
    expect(document).toMatchObject({ verified: true, guarantee: true, plan: [{ route: 'reserve' }] });
    const verdict = await cliJson<Verdict>(['verify', ...args]);
    expect(verdict).toMatchObject({ status: 0, document: { satisfied: true } });
    const again = await cliJson<AllocationResult>(['allocate', ...args]);
    expect(again.document).toMatchObject({ plan: [], verified: true, guarantee: true });
  } else {
    const verdict = await cliJson<Verdict>(['verify', ...args]);
    expect(verdict).toMatchObject({ status: 3, document: { satisfied: false } });
  }
  await guest.waitReady();
  fill(mounted.path);
  await body(guest, file);
  for (let i = 0; ; i++) {
    const gone = await unlink(`${mounted.path}/neighbour-${i}`).then(() => true, () => false);
    if (!gone) break;
  }
}

describe.runIf(runnable)('a qcow2 disk of a guest, on a file system that a neighbour fills', () => {
  it('is written whole where host blocks were reserved for it', async () => {
    await withGuest(true, async (guest, file) => {
      await guest.command('fill 7');
      expect(await guest.ask('verify')).toMatchObject({ errors: 0, blocks: size / 4096 });
      expect(await hostBytes(file)).toBeGreaterThan(size);
    });
  });

  it('stops its guest for want of space where none were', async () => {
    await withGuest(false, async (guest) => {
      const filling = guest.command('fill 7').then(() => 'filled', () => 'failed');
      expect(await stopped(guest)).toBe('io-error');
      guest.kill('SIGKILL');
      expect(await filling).toBe('failed');
    });
  });
});

async function stopped(guest: Guest): Promise<string> {
  const { QmpClient } = await import('../../lib/index.js');
  await using client = await QmpClient.connect(guest.qmpSocket);
  for (let i = 0; i < 1200; i++) {
    const { status } = await client.execute('query-status');
    if (status !== 'running') return status;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  return 'running';
}

describe.runIf(runnable)('what a reservation must be', () => {
  it('grows with a snapshot, which verify tells', async () => {
    await using mounted = await mountFilesystem({ ...EXT4, size: 256 * MiB });
    const file = `${mounted.path}/disk.qcow2`;
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file, String(size)]);
    await mustRun('qemu-io', ['-f', 'qcow2', '-c', 'write -P 3 0 16M', file]);
    await using guest = await startGuest({ disks: [{ id: 'disk0', file, format: 'qcow2' }] });
    const args = ['--qmp', guest.qmpSocket, '--device', 'disk0'];
    await cliJson(['allocate', ...args]);
    const before = await stat(file);
    await using client = await (await import('../../lib/index.js')).QmpClient.connect(guest.spareQmp);
    const job = { device: 'node-disk0', name: 'later' };
    await client.executeAny('blockdev-snapshot-internal-sync', job).catch(() => undefined);
    const verdict = await cliJson<Verdict>(['verify', ...args]);
    expect(verdict).toMatchObject({ status: 3, document: { satisfied: false } });
    expect(verdict.document.missing.some(({ why }) => /reserve/.test(why))).toBe(true);
    const { document } = await cliJson<AllocationResult>(['allocate', ...args]);
    expect(document).toMatchObject({ verified: true, guarantee: true });
    expect((await stat(file)).blocks).toBeGreaterThan(before.blocks);
  });
});

describe.runIf(runnable)('a reservation on xfs', () => {
  const guarantees = async (commands: string[]): Promise<AllocationResult> => {
    await using mounted = await mountFilesystem({ type: 'xfs', size: 384 * MiB });
    const file = `${mounted.path}/disk.qcow2`;
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file, String(size)]);
    await mustRun('qemu-io', ['-f', 'qcow2', ...commands.flatMap((command) => ['-c', command]), file]);
    await using guest = await startGuest({ disks: [{ id: 'disk0', file, format: 'qcow2' }] });
    return (await cliJson<AllocationResult>(['allocate', '--qmp', guest.qmpSocket, '--device', 'disk0'])).document;
  };

  it('is a promise where every cluster holds data', async () => {
    expect(await guarantees([`write -P 3 0 ${size}`])).toMatchObject({ verified: true, guarantee: true });
  });

  it('is none where QEMU zeroes what is around a write, which gives the blocks back', async () => {
    const result = await guarantees([`write -P 3 0 ${size - MiB}`]);
    expect(result).toMatchObject({ verified: true, guarantee: false });
    expect(result.warnings.join()).toContain('xfs may need new blocks');
  });
});

describe.runIf(runnable)('a reservation on tmpfs', () => {
  it('is made and seen behind the end of the file too', async () => {
    await using mounted = await mountFilesystem(TMPFS);
    const file = `${mounted.path}/disk.qcow2`;
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file, String(16 * MiB)]);
    await using guest = await startGuest({ disks: [{ id: 'disk0', file, format: 'qcow2' }] });
    const args = ['--qmp', guest.qmpSocket, '--device', 'disk0'];
    const { document } = await cliJson<AllocationResult>(['allocate', ...args]);
    expect(document).toMatchObject({ verified: true, guarantee: true });
    expect(await hostBytes(file)).toBeGreaterThan(16 * MiB);
    expect(await cliJson(['verify', ...args])).toMatchObject({ status: 0, document: { satisfied: true } });
  });
});
