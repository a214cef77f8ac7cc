import {
  existsSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  truncateSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it, onTestFinished, vi } from 'vitest';
import { attachLoop, backingFile } from './loop.js';
import { mustRun, repository, run, start, startQemu } from './processes.js';
import { requires } from './requirements.js';
import { scratch, scratchPath } from './scratch.js';
import { waitFor } from './wait.js';

function sparseFile(): string {
  const file = scratchPath('disk.raw');
  writeFileSync(file, '');
  truncateSync(file, 16 * 1024 * 1024);
  return file;
}

/** One that only waits for its parent to take notice counts as gone: it holds nothing any more. */
function isAlive(pid: number): boolean {
  try {
    return !/^State:\s*Z/m.test(readFileSync(`/proc/${pid}/status`, 'utf8'));
  } catch {
    return false;
  }
}

describe('run', () => {
  it('gives status and output, and fails only if there is no such command', async () => {
    const outcome = await run('sh', ['-c', 'cat; echo bad >&2; exit 7'], { input: 'in' });
    expect(outcome).toEqual({ status: 7, signal: null, stdout: 'in', stderr: 'bad\n' });
    await expect(run('/nonexistent', [])).rejects.toThrow('ENOENT');
    await expect(mustRun('sh', ['-c', 'echo bad >&2; exit 7'])).rejects.toThrow('status 7: bad');
  });

  it('kills what takes too long', async () => {
    expect(await run('sleep', ['60'], { timeout: 50 })).toMatchObject({ status: null, signal: 'SIGKILL' });
  });
});

describe('start', () => {
  it('lets a test wait for output and send signals', async () => {
    const script = 'trap "echo over; exit 3" TERM; echo ready; while :; do sleep 0.01; done';
    const child = start('sh', ['-c', script]);
    expect((await child.output('stdout', /rea(d)y/))[1]).toBe('d');
    child.kill('SIGTERM');
    expect(await child.exit).toMatchObject({ status: 3, stdout: 'ready\nover\n' });
  });

  it('fails to wait for output that will not come', async () => {
    const child = start('sh', ['-c', 'echo other']);
    await expect(child.output('stdout', /ready/)).rejects.toThrow('other');
  });
});

const qemuTools = ['qemu-storage-daemon', 'qemu-system-x86_64', 'qemu-img', 'nbdinfo'];
const devices = { root: true, loop: true } as const;

describe.runIf(requires({ tools: qemuTools }))('startQemu', () => {
  it('runs a guest that keeps others from writing', async () => {
    const file = sparseFile();
    const write = ['convert', '-n', '-O', 'raw', sparseFile(), file];
    const qemu = await startQemu({ file, kind: 'guest' });
    expect((await run('qemu-img', write)).stderr).toContain('Failed to get "write" lock');
    await qemu.dispose();
    expect(isAlive(qemu.pid)).toBe(false);
    expect((await run('qemu-img', write)).status).toBe(0);
  });

  it('runs a daemon that keeps others from resizing', async () => {
    const file = sparseFile();
    const resize = ['resize', '-f', 'raw', file, '32M'];
    const qemu = await startQemu({ file });
    expect((await run('qemu-img', resize)).stderr).toContain('Failed to get "resize" lock');
    await qemu.dispose();
    expect((await run('qemu-img', resize)).status).toBe(0);
  });

  it('serves the disk over NBD', async () => {
    await using qemu = await startQemu({ file: sparseFile() });
    expect(await mustRun('nbdinfo', ['--size', qemu.nbd!])).toBe('16777216\n');
  });

  it('says what QEMU said when it does not start', async () => {
    const file = sparseFile();
    await using _holder = await startQemu({ file });
    await expect(startQemu({ file, kind: 'guest' })).rejects.toThrow(/Failed to get .*lock/);
  });
});

describe.runIf(requires({ ...devices, tools: ['losetup', 'qemu-storage-daemon'] }))('startQemu on a device', () => {
  it('opens it as host_device', async () => {
    await using loop = await attachLoop({ file: sparseFile() });
    await using qemu = await startQemu({ file: loop.device, device: 'host_device' });
    expect(readFileSync(`/proc/${qemu.pid}/cmdline`, 'utf8')).toContain('host_device');
  });
});

describe('requires', () => {
  it('says what is missing, and throws in CI', () => {
    const write = vi.spyOn(process.stderr, 'write').mockReturnValue(true);
    vi.stubEnv('CI', '');
    expect(requires({ tools: ['sh', 'no-such-tool'] })).toBe(false);
    expect(write).toHaveBeenCalledExactlyOnceWith('SKIPPED: missing for these tests: no-such-tool\n');
    vi.stubEnv('CI', 'true');
    expect(() => requires({ tools: ['no-such-tool'] })).toThrow('no-such-tool');
    expect(requires({ tools: ['sh'] })).toBe(true);
    vi.unstubAllEnvs();
    write.mockRestore();
  });
});

describe.runIf(requires({ ...devices, tools: ['losetup', 'mkfs.ext4'] }))('every way out', () => {
  const forever = 'await new Promise(() => {})';
  const openFile = 'openSync(path + "/file", "w")';
  const ways = {
    'a failing test': 'throw new Error("failing")',
    'an error nobody catches': `setTimeout(() => { throw new Error("uncaught") }); ${forever}`,
    SIGTERM: `process.kill(process.pid, "SIGTERM"); ${forever}`,
    'SIGTERM while a file is open': `${openFile}; process.kill(process.pid, "SIGTERM"); ${forever}`,
    'SIGKILL of vitest': `process.kill(process.ppid, "SIGKILL"); ${forever}`,
    'the exit hook': `${openFile}; process.emit("exit", 0); process.kill(process.pid, "SIGKILL")`,
  };

  it.each(Object.entries(ways))('leaves nothing behind: %s', async (_name, ending) => {
    const report = scratchPath('report.json');
    // A root of its own, inside the repository to find vitest, yet unseen by its test runs.
    const root = mkdtempSync(join(repository, 'build-way-out-'));
    onTestFinished(() => rmSync(root, { recursive: true }));
    writeFileSync(join(root, 'vitest.config.mjs'), 'export default {};');
    writeFileSync(join(root, 'inner.test.ts'), innerTest(report, ending));
    const vitest = join(repository, 'node_modules/vitest/vitest.mjs');
    const env = { THICKEN_SCRATCH: scratch(), CI: undefined };
    const args = [vitest, 'run', '--pool=forks', '--testTimeout=2000', '--root', root];
    expect((await run(process.execPath, args, { env, timeout: 60_000 })).status).not.toBe(0);
    const made = JSON.parse(readFileSync(report, 'utf8')) as Record<string, string>;
    const { path, device, image, pid } = made;
    // Nobody waits for a worker whose vitest was killed.
    await waitFor('the folder to be gone', () => !existsSync(dirname(path!)));
    await waitFor('the child to be gone', () => !isAlive(Number(pid)));
    expect(readFileSync('/proc/mounts', 'utf8')).not.toContain(path);
    expect(backingFile(device!)).not.toBe(image);
  }, 90_000);

  function innerTest(report: string, ending: string): string {
    return `
      import { openSync, writeFileSync } from 'node:fs';
      import { it } from 'vitest';
      import { mountFilesystem } from '${repository}/test/support/filesystems.js';
      import { start } from '${repository}/test/support/processes.js';
      it('ends', async () => {
        const size = 64 * 1024 * 1024;
        const { path, device, image } = await mountFilesystem({ type: 'ext4', size });
        const { pid } = start('sleep', ['1000']);
        writeFileSync(${JSON.stringify(report)}, JSON.stringify({ path, device, image, pid }));
        ${ending};
      });`;
  }
});
