import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { truncateSync, writeFileSync } from 'node:fs';
import { open as openFile } from 'node:fs/promises';
import { join } from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import { hold } from '../support/cleanup.js';
import { attachLoop } from '../support/loop.js';
import { cli, mustRun, repository, run, spawnCli, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';

const MIB = 2 ** 20;
const SIZE = 256 * MIB;
const runnable = requires({ root: true, loop: true });

function sparse(size = SIZE): string {
  const path = scratchPath('held.raw');
  writeFileSync(path, '');
  truncateSync(path, size);
  return path;
}

const releases: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const release of releases.splice(0)) await release();
});

/** Starts the foreign writer; `stop` ends it and tells which blocks it wrote. */
async function startWriter(path: string, size = SIZE) {
  const script = join(repository, 'test/support/writer.mjs');
  const child = spawn(process.execPath, [script, path, String(size), '7'], {
    stdio: ['pipe', 'pipe', 'inherit'],
  });
  releases.push(hold({ release: async () => void child.kill('SIGKILL'), releaseSync: () => void child.kill('SIGKILL') }));
  let output = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (output += text));
  await waitFor('the writer to have it open', async () => output.startsWith('open'));
  return async (): Promise<number[]> => {
    child.stdin.end();
    await once(child, 'close');
    return JSON.parse(output.slice('open\n'.length)) as number[];
  };
}

async function expectKept(path: string, offsets: number[]): Promise<void> {
  expect(offsets.length).toBeGreaterThan(0);
  const file = await openFile(path);
  const block = Buffer.alloc(4096);
  const wanted = Buffer.alloc(4096, 0x5a);
  const lost = [];
  for (const offset of offsets) {
    await file.read(block, 0, 4096, offset);
    if (!block.equals(wanted)) lost.push(offset);
  }
  await file.close();
  expect(lost).toEqual([]);
}

async function startSlowly(path: string, speed = '64M') {
  const spawned = spawnCli(
    ['allocate', path, '--preallocation', 'full', '--speed', speed, '--progress', 'json'],
    { timeout: 60_000 },
  );
  await spawned.output('stderr', /"position":[1-9]/);
  return spawned;
}

describe.runIf(runnable)('a file that zeros are written to', () => {
  it('is let go, with every write kept, when somebody starts to write to it', async () => {
    const path = sparse();
    await using run = await startSlowly(path);
    const stop = await startWriter(path);
    const { status, stderr } = await run.exit;
    await expectKept(path, await stop());
    expect(status, stderr).toBe(4);
    expect(stderr).toContain('"IN_USE"');
  });

  it('keeps every write of one who comes at full speed', async () => {
    const path = sparse(512 * MIB);
    const allocation = cli(['allocate', path, '--preallocation', 'full']);
    await waitFor('blocks', async () => {
      const { stdout } = await run('stat', ['-c', '%b', path]);
      return Number(stdout) > 32 * 2048;
    });
    const stop = await startWriter(path, 512 * MIB);
    const { status } = await allocation;
    await expectKept(path, await stop());
    expect([0, 4]).toContain(status);
  });

  it('is let go when a loop device is attached to it', async () => {
    const path = sparse();
    await using allocation = await startSlowly(path);
    await using loop = await attachLoop({ file: path });
    const { status, stderr } = await allocation.exit;
    expect(status, stderr).toBe(4);
    expect(stderr).toContain(loop.device);
  });

  it('is allocated to its end beside those who only read', async () => {
    const path = sparse();
    await using allocation = await startSlowly(path, '128M');
    for (let i = 0; i < 20; i++) await mustRun('head', ['-c', '4096', path]);
    const { status, stderr } = await allocation.exit;
    expect(status, stderr).toBe(0);
  });

  it('is allocated to its end though writers come that leave again', async () => {
    const path = sparse();
    await using allocation = await startSlowly(path, '128M');
    await mustRun('sh', ['-c', `printf x | dd of=${path} bs=1 seek=200000000 conv=notrunc`]);
    const { status, stderr } = await allocation.exit;
    expect(status, stderr).toBe(0);
    const { stdout } = await run('dd', [`if=${path}`, 'bs=1', 'skip=200000000', 'count=1']);
    expect(stdout).toBe('x');
  });
});

describe.runIf(runnable)('a loop device is refused', () => {
  const refused = async (device: string) => {
    const outcome = await cli(['allocate', device, '--preallocation', 'full']);
    expect(outcome.status, outcome.stderr).toBe(4);
    return outcome.stderr;
  };

  it('when a process has its file open for writing', async () => {
    const file = sparse();
    await using loop = await attachLoop({ file });
    await startWriter(file);
    expect(await refused(loop.device)).toMatch(/node/);
  });

  it('when another loop device lies on the same file', async () => {
    const file = sparse();
    await using loop = await attachLoop({ file });
    await using other = await attachLoop({ file });
    expect(await refused(loop.device)).toContain(other.device);
  });

  it('when a process has the device below it open', async () => {
    const file = sparse();
    await using below = await attachLoop({ file });
    await using above = await attachLoop({ file: below.device });
    const stop = await startWriter(below.device);
    expect(await refused(above.device)).toMatch(/node/);
    // A loop device that somebody has open can't be detached.
    await stop();
  });

  it('when a process has mapped it, and closed the descriptor', async () => {
    const file = sparse();
    await using loop = await attachLoop({ file });
    const script = [
      'import mmap, os, sys, time',
      'fd = os.open(sys.argv[1], os.O_RDWR)',
      'm = mmap.mmap(fd, 4096)',
      'os.close(fd)',
      'print("mapped", flush=True)',
      'time.sleep(600)',
    ].join('\n');
    await using mapper = start('python3', ['-c', script, loop.device]);
    await mapper.output('stdout', /mapped/);
    // Python's mmap keeps a duplicate of the descriptor; either way it is a user.
    expect(await refused(loop.device)).toMatch(/python3/);
  });

  it('from a namespace of process ids that hides the others', async () => {
    const file = sparse();
    await using loop = await attachLoop({ file });
    const args = ['--pid', '--fork', '--mount-proc', process.execPath, join(repository, 'dist/cli/main.js')];
    const outcome = await run('unshare', [...args, 'allocate', loop.device]);
    expect(outcome.status, outcome.stderr).toBe(4);
    expect(outcome.stderr).toContain('--exclusive');
    const vouched = await run('unshare', [...args, 'allocate', loop.device, '--exclusive']);
    expect(vouched.status, vouched.stderr).toBe(0);
  });
});

describe.runIf(runnable)('a block device that zeros are written to', () => {
  it.each(['the same node', 'another node', 'the file behind it'])(
    'is let go, with every write kept, when somebody writes through %s',
    async (through) => {
      const file = sparse();
      await using loop = await attachLoop({ file });
      const node = scratchPath('node');
      const { stdout } = await run('stat', ['-c', '%t %T', loop.device]);
      const [major, minor] = stdout.trim().split(' ').map((text) => String(parseInt(text, 16)));
      await mustRun('mknod', [node, 'b', major!, minor!]);
      const places: Record<string, string> = { 'the same node': loop.device, 'another node': node };
      // Slow: the other node is looked for twice a second only, and what is written ahead is kept.
      await using allocation = await startSlowly(loop.device, '16M');
      const stop = await startWriter(places[through] ?? file);
      const { status, stderr } = await allocation.exit;
      await expectKept(loop.device, await stop());
      expect(status, stderr).toBe(4);
    },
  );
});
