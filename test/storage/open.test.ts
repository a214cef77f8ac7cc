import { renameSync, statSync } from 'node:fs';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { Descriptor, READ_ONLY, READ_WRITE } from '../../lib/descriptor.js';
import { open } from '../../lib/index.js';
import { native } from '../../lib/native.js';
import { mountFilesystem } from '../support/filesystems.js';
import { attachLoop } from '../support/loop.js';
import { mustRun, start, type Spawned } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { cliJson, expectOneLine, makeSparse, MiB, TMPFS, type Refusal } from './helpers.js';

/** What happens between the look at a name and its opening. */
let meanwhile: ((path: string) => void) | undefined;

vi.mock(import('node:fs/promises'), async (original) => {
  const real = await original();
  const stat = async (...args: Parameters<typeof real.stat>) => {
    const facts = await real.stat(...args);
    meanwhile?.(String(args[0]));
    return facts;
  };
  return { ...real, stat: stat as typeof real.stat };
});

const devices = requires({ root: true, loop: true, tools: ['losetup', 'mount', 'truncate'] });

let before: number;
beforeEach(() => void (before = Descriptor.ownNumbers().size));

afterEach(() => {
  meanwhile = undefined;
  vi.restoreAllMocks();
  expect(Descriptor.ownNumbers().size).toBe(before);
});

describe('a name that leads elsewhere by the time it is opened', () => {
  it.each(['another file', 'a device'])('is not opened: %s', async (what) => {
    const path = makeSparse(scratchPath('disk.raw'), MiB);
    const other = makeSparse(scratchPath('other.raw'), MiB);
    if (what === 'a device') await mustRun('mknod', [`${other}.node`, 'c', '1', '3']);
    meanwhile = (name) => {
      if (name === path) renameSync(what === 'a device' ? `${other}.node` : other, path);
    };
    await expect(open(path)).rejects.toMatchObject({ code: 'CHANGED', path });
  });

  it.runIf(devices)('is not taken for the file behind a loop device', async () => {
    const file = makeSparse(scratchPath('disk.raw'), MiB);
    const other = makeSparse(scratchPath('other.raw'), MiB);
    await using loop = await attachLoop({ file });
    meanwhile = (name) => {
      if (name === file) renameSync(other, file);
    };
    await using image = await open(loop.device);
    expect(image.extentMethod).toBe(null);
  });
});

describe.runIf(devices)('a loop device whose file system can’t be read', () => {
  it('leaves no descriptor open', async () => {
    await using loop = await attachLoop({ file: makeSparse(scratchPath('disk.raw'), MiB) });
    vi.spyOn(native(), 'fileFacts').mockRejectedValue(Object.assign(new Error('EIO'), { errno: 5 }));
    await expect(open(loop.device)).rejects.toMatchObject({ code: 'EIO' });
  });
});

describe.runIf(devices)('a file of more than 2^53-1 bytes', () => {
  it.each([2n ** 53n, 2n ** 63n - 1n])('is refused when it is opened (%d)', async (size) => {
    await using mounted = await mountFilesystem(TMPFS);
    const path = `${mounted.path}/disk.raw`;
    await mustRun('truncate', ['-s', String(size), path]);
    await expect(open(path)).rejects.toSatisfy((error) => error instanceof RangeError);
    for (const command of ['info', 'map', 'verify', 'allocate']) {
      const outcome = await cliJson<Refusal>([command, path]);
      expect(outcome.status).toBe(2);
      expectOneLine(outcome, 'RANGE');
      expect(outcome.document.error).toMatchObject({ code: 'RANGE', path });
    }
    expect(statSync(path).blocks).toBe(0);
  });
});

describe.runIf(requires({ tools: ['python3'] }))('a lease that somebody holds for a moment', () => {
  // Lets go of it as soon as an opening breaks it, or a little later.
  const holder = `
import fcntl, os, signal, sys, time
kind = sys.argv[2]
fd = os.open(sys.argv[1], os.O_RDONLY if kind == 'read' else os.O_RDWR)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK if kind == 'read' else fcntl.F_WRLCK)
print('held', flush=True)
signal.sigwait([signal.SIGIO])
time.sleep(float(sys.argv[3]))
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
time.sleep(600)
`;

  async function holdLease(path: string, kind: 'read' | 'write', seconds: number): Promise<Spawned> {
    const spawned = start('python3', ['-c', holder, path, kind, String(seconds)]);
    await spawned.output('stdout', /held/);
    return spawned;
  }

  it('is waited for when a name is opened', async () => {
    const path = makeSparse(scratchPath('disk.raw'), MiB);
    await using _lease = await holdLease(path, 'write', 0.03);
    await using image = await open(path);
    expect(image.size).toBe(MiB);
  });

  it('is waited for when the file is opened once more', async () => {
    const path = makeSparse(scratchPath('disk.raw'), MiB);
    await using descriptor = await Descriptor.open(path, READ_ONLY);
    await using _lease = await holdLease(path, 'read', 0.3);
    await using again = await descriptor.reopen(READ_WRITE);
    expect(again.path).toBe(path);
  });

  it('is an error where it lasts', async () => {
    const path = makeSparse(scratchPath('disk.raw'), MiB);
    await using _lease = await holdLease(path, 'write', 600);
    await expect(open(path)).rejects.toMatchObject({ code: 'EAGAIN', path });
  });
});
