import { setTimeout as sleep } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { serveFile } from '../nbd/servers.js';
import { mountFilesystem } from '../support/filesystems.js';
import { mustRun } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import {
  expectClean,
  expectFailure,
  expectIntact,
  expectPopulated,
  isPopulated,
  makeDisk,
  makeTemplate,
  MiB,
  mustAllocate,
  ROUTES,
  startAllocate,
  startHost,
  TOOLS,
  underway,
} from './rig.js';

const runnable = requires({ tools: TOOLS });
const storage = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4', 'fallocate', 'mount'] });

describe.runIf(runnable).each(ROUTES)('the template’s server, while %s runs', (route) => {
  it('is killed: told as such; with it back, another run completes', async () => {
    const template = await makeTemplate();
    const server = await serveFile(template);
    const disk = await makeDisk(server.uri);
    {
      await using host = await startHost({ disks: [disk.overlay] });
      const spawned = startAllocate(host, { route, speed: '6M' });
      await underway(spawned);
      server.process.kill('SIGKILL');
      const { error, done } = await expectFailure(spawned, ['EIO', 'JOB_FAILED']);
      expect(error.message).toMatch(/storage|chain/);
      expect(done!.allocated).toBeGreaterThan(0);
      await expectClean(host);
      await host.quit();
    }
    await using again = await serveFile(template);
    await mustRun('ln', ['-sf', again.socketPath, server.socketPath]);
    await expectIntact(disk);
    await using host = await startHost({ disks: [disk.overlay] });
    await mustAllocate(host, { route });
    await expectClean(host);
    await expectPopulated(host, disk, { alone: route === 'stream' });
  });

  it('answers EIO for a part: told as such; once it does not, the same QEMU completes', async () => {
    const template = await makeTemplate();
    const bad = scratchPath('error');
    await using server = await serveFile(template, ['error'], ['error-pread=EIO', 'error-pread-rate=20%', `error-file=${bad}`]);
    const disk = await makeDisk(server.uri);
    await using host = await startHost({ disks: [disk.overlay] });
    await mustRun('touch', [bad]);
    const { error } = await expectFailure(startAllocate(host, { route }), ['EIO']);
    expect(error.message).toMatch(/storage|chain/);
    await expectClean(host);
    await mustRun('rm', [bad]);
    await mustAllocate(host, { route });
    await expectClean(host);
    await expectPopulated(host, disk, { alone: route === 'stream' });
  });

  it('answers slowly: a killed run leaves requests under way, and the next run completes', async () => {
    await using server = await serveFile(await makeTemplate(12 * MiB), ['delay'], ['delay-read=40ms']);
    const disk = await makeDisk(server.uri);
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route });
    await underway(spawned);
    expect(spawned.child.exitCode).toBe(null);
    spawned.kill('SIGKILL');
    await spawned.exit;
    await mustAllocate(host, { route });
    await expectClean(host);
    await expectPopulated(host, disk, { alone: route === 'stream' });
  });
});

describe.runIf(runnable)('a template’s server that hangs', () => {
  it('holds a killed run’s export, and neither the next run nor QEMU; once it answers, all goes on', async () => {
    await using server = await serveFile(await makeTemplate());
    const disk = await makeDisk(server.uri);
    await using host = await startHost({ disks: [disk.overlay] });
    const spawned = startAllocate(host, { route: 'populate', speed: '6M' });
    await underway(spawned);
    server.process.kill('SIGSTOP');
    try {
      // In this time the next requests are on their way: a run that is killed between two leaves none to wait for.
      await sleep(1_000);
      expect(spawned.child.exitCode).toBe(null);
      spawned.kill('SIGKILL');
      await spawned.exit;
      const { error } = await expectFailure(startAllocate(host, { route: 'populate' }), ['NBD_BUSY']);
      expect(error.message).toMatch(/waits for the storage/);
      expect(await host.ask('query-status')).toMatchObject({ status: 'prelaunch' });
    } finally {
      server.process.kill('SIGCONT');
    }
    await mustAllocate(host, { route: 'populate' });
    await expectClean(host);
    await expectPopulated(host, disk);
  });

  it('ends with SIGINT a run that reads its map, and another completes once it answers', async () => {
    await using server = await serveFile(await makeTemplate());
    const disk = await makeDisk(server.uri);
    await using host = await startHost({ disks: [disk.overlay] });
    server.process.kill('SIGSTOP');
    try {
      const spawned = startAllocate(host);
      await waitFor('a look at the map', async () => (await host.ask('query-block-exports') as unknown[]).length > 0);
      // The export is there; a request follows within milliseconds, and is not answered.
      await sleep(1_000);
      spawned.kill('SIGINT');
      const { done } = await expectFailure(spawned, ['CANCELLED'], 130);
      expect(done).toMatchObject({ allocated: 0 });
      expect(await host.ask('query-status')).toMatchObject({ status: 'prelaunch' });
    } finally {
      server.process.kill('SIGCONT');
    }
    await mustAllocate(host);
    await expectClean(host);
    await expectPopulated(host, disk);
  });
});

describe.runIf(storage).each(ROUTES)('a file system that is full, while %s runs', (route) => {
  it('is told as such; with room, the same QEMU completes', async () => {
    const template = await makeTemplate();
    await using mounted = await mountFilesystem({ type: 'ext4', size: 64 * MiB, mkfsArgs: ['-m', '0', '-O', '^has_journal'] });
    const disk = await makeDisk(template, `${mounted.path}/overlay.qcow2`);
    {
      await using host = await startHost({ disks: [disk.overlay] });
      const spawned = startAllocate(host, { route, speed: '6M', more: ['--preallocation', 'metadata'] });
      await underway(spawned);
      // A neighbour takes all that is free; what is left of the last megabyte, byte by byte.
      for (const unit of ['1M', '64K', '4K']) {
        await mustRun('sh', ['-c', `i=0; while fallocate -l ${unit} ${mounted.path}/neighbour-${unit}-$i 2>&-; do i=$((i+1)); done; true`]);
      }
      const { error, done } = await expectFailure(spawned, ['ENOSPC']);
      expect(error.message).toMatch(/free some space/);
      expect(done!.allocated).toBeGreaterThan(0);
      await expectClean(host);
      await mustRun('sh', ['-c', `rm ${mounted.path}/neighbour-*`]);
      await mustAllocate(host, { route, more: ['--preallocation', 'metadata'] });
      await expectClean(host);
      await host.quit();
    }
    expect(await isPopulated(disk.overlay)).toBe(true);
    await expectIntact(disk, { alone: route === 'stream' });
  });
});
