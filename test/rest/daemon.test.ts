import { execFileSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readdirSync, readFileSync, readlinkSync, statSync, watch } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { Chain } from '../../lib/chain/chain.js';
import { Descriptor, READ_ONLY } from '../../lib/descriptor.js';
import type { ThickenError } from '../../lib/errors.js';
import { NodeExport } from '../../lib/qemu/node-export.js';
import { RestEngine } from '../../lib/qemu/rest-engine.js';
import { StorageDaemon } from '../../lib/qemu/storage-daemon.js';
import { hold } from '../support/cleanup.js';
import { mustRun, start, type Spawned } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { daemonsIn, expectNothingLeft, processesWith, withDaemon } from './helpers.js';

const MiB = 2 ** 20;
const holder = fileURLToPath(new URL('../support/daemon-holder.mjs', import.meta.url));

const fileNode = (filename: string) => ({ driver: 'file', 'node-name': 'file', filename, 'read-only': true });

const failureOf = (promise: Promise<unknown>) =>
  promise.then(
    () => expect.fail('it did not fail'),
    (error: unknown) => error as ThickenError,
  );

/** Another process that has a daemon; and its folder. `by`: what it is started by. */
async function startHolder(by: string[] = []): Promise<{ holding: Spawned; folder: string }> {
  const [command, ...args] = [...by, process.execPath, holder];
  const holding = start(command!, args);
  const [, socket] = await holding.output('stdout', /ready (\S+)/);
  return { holding, folder: dirname(socket!) };
}

function kill(...pids: number[]): void {
  for (const pid of pids) process.kill(pid, 'SIGKILL');
}

/** Pages that a process has been given so far (proc(5), minflt). */
function pageFaults(pid: number): number {
  return Number(readFileSync(`/proc/${pid}/stat`, 'utf8').split(') ')[1]!.split(' ')[7]);
}

describe.runIf(withDaemon)('a storage daemon', () => {
  it('serves nodes that it is given, on sockets that are private', async () => {
    const image = scratchPath('image.raw');
    await mustRun('qemu-img', ['create', '-q', '-f', 'raw', image, '3M']);
    await using daemon = await StorageDaemon.start();
    await daemon.addFile(fileNode(image));
    await daemon.addNode({ driver: 'raw', 'node-name': 'disk', file: 'file', 'read-only': true });
    await using added = await NodeExport.on(daemon.server, daemon.qmp, 'disk');
    expect(added.nbd.size).toBe(3 * 2 ** 20);
    const folder = dirname(daemon.qmp.name);
    expect(statSync(folder).mode & 0o777).toBe(0o700);
    const names = readdirSync(folder);
    expect(names.sort()).toEqual(['nbd.sock', 'qmp.sock']);
    for (const name of names) expect(statSync(join(folder, name)).mode & 0o777, name).toBe(0o600);
    const nodes = await daemon.qmp.execute('query-named-block-nodes', { flat: true });
    expect(nodes.find((node) => node['node-name'] === 'file')?.cache?.direct).toBe(true);
  });

  it('keeps the memory that it copies through', async () => {
    const [template, overlay] = [scratchPath('template'), scratchPath('overlay')];
    const size = 128 * MiB;
    await mustRun('qemu-img', ['create', '-q', '-f', 'raw', template, String(size)]);
    await mustRun('qemu-io', ['-f', 'raw', '-c', `write -P 7 0 ${size}`, template]);
    await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', template, '-F', 'raw', overlay]);
    await using file = await Descriptor.open(overlay, READ_ONLY);
    await using chain = await Chain.open(file, 'qcow2');
    await using engine = await RestEngine.work(chain);
    const [daemon] = daemonsIn(tmpdir());
    const before = pageFaults(daemon!);
    for (let at = 0; at < size; at += 8 * MiB) await engine.added.nbd.cache(at, 8 * MiB);
    // Each page of each buffer anew would be as many as the disk has pages.
    expect(pageFaults(daemon!) - before).toBeLessThan(size / 4096 / 4);
  });

  it('is gone when its user is through with it, and so are its guardian and its folder', async () => {
    await using daemon = await StorageDaemon.start();
    expect(daemonsIn(tmpdir())).toHaveLength(1);
    await daemon[Symbol.asyncDispose]();
    // At once: nothing is left to a moment later.
    expect(processesWith(tmpdir())).toEqual([]);
    expect(readdirSync(tmpdir())).toEqual([]);
  });

  it.runIf(requires({ root: true, tools: ['mount'] }))('opens a file without direct I/O where there is none', async () => {
    const folder = scratchPath('ramfs');
    mkdirSync(folder);
    await mustRun('mount', ['-t', 'ramfs', 'none', folder]);
    const umount = () => void execFileSync('umount', ['-l', folder]);
    await using _mounted = { [Symbol.asyncDispose]: hold({ release: async () => umount(), releaseSync: umount }) };
    const path = join(folder, 'file');
    await mustRun('qemu-img', ['create', '-q', '-f', 'raw', path, '1M']);
    await using daemon = await StorageDaemon.start();
    await daemon.addFile(fileNode(path));
    const nodes = await daemon.qmp.execute('query-named-block-nodes', { flat: true });
    expect(nodes.find((node) => node['node-name'] === 'file')?.cache?.direct).toBe(false);
  });

  it('says what QEMU says of a node that it does not take', async () => {
    const node = { driver: 'file', 'node-name': 'file', filename: '/nowhere', 'read-only': true };
    const error = await failureOf(StorageDaemon.start([node]));
    expect(error).toMatchObject({ code: 'QMP_COMMAND' });
    expect(error.message).toContain("Could not open '/nowhere': No such file or directory");
  });

  it('that does not start is told of in its own words', async () => {
    const usual = process.env.TMPDIR!;
    const long = join(usual, 'x'.repeat(30), 'y'.repeat(30));
    mkdirSync(long, { recursive: true });
    process.env.TMPDIR = long;
    const error = await failureOf(StorageDaemon.start()).finally(() => (process.env.TMPDIR = usual));
    expect(error).toMatchObject({ code: 'DAEMON_FAILED' });
    expect(error.message).toMatch(/ended with status 1: .*too long/);
    expect(readdirSync(long)).toEqual([]);
    await mustRun('rm', ['-r', dirname(long)]);
  });

  it('that is not installed is named with its packages', async () => {
    const usual = process.env.PATH;
    process.env.PATH = '/nowhere';
    const error = await failureOf(StorageDaemon.start()).finally(() => (process.env.PATH = usual));
    expect(error).toMatchObject({ code: 'DAEMON_MISSING' });
    expect(error.message).toMatch(/Debian.*qemu-system-common.*Fedora.*qemu-img/);
  });

  it('whose start is cancelled is not left behind', async () => {
    const controller = new AbortController();
    const started = StorageDaemon.start([], { signal: controller.signal });
    await waitFor('its folder', () => readdirSync(tmpdir()).length > 0);
    controller.abort();
    // It may have been faster.
    const outcome: unknown = await started.catch((error: unknown) => error);
    if (outcome instanceof StorageDaemon) await outcome[Symbol.asyncDispose]();
    else expect(outcome).toMatchObject({ code: 'CANCELLED' });
  });

  it('whose user is killed the moment its folder appears leaves nothing', async () => {
    for (let i = 0; i < 10; i++) {
      const watcher = watch(tmpdir());
      const appeared = once(watcher, 'change');
      const holding = start(process.execPath, [holder]);
      await appeared;
      holding.kill('SIGKILL');
      watcher.close();
      expect((await holding.exit).signal).toBe('SIGKILL');
      await expectNothingLeft();
    }
  });

  it('that is killed explains what fails after it', async () => {
    await using daemon = await StorageDaemon.start();
    kill(...daemonsIn(tmpdir()));
    const lost = await failureOf(daemon.qmp.execute('query-name'));
    const error = await daemon.explain(lost, '/the/image');
    expect(error).toMatchObject({ code: 'DAEMON_LOST', path: '/the/image' });
    expect((error as Error).message).toContain('ended by signal 9');
  });
});

describe.runIf(withDaemon)('a thicken that goes without its daemon', () => {
  it.each(['SIGKILL', 'SIGTERM'] as const)('by %s leaves nothing', async (signal) => {
    const { holding, folder } = await startHolder();
    expect(daemonsIn(folder)).toHaveLength(1);
    holding.kill(signal);
    await holding.exit;
    await expectNothingLeft();
  });

  it('leaves none that hangs', async () => {
    const { holding, folder } = await startHolder();
    const [pid] = daemonsIn(folder);
    process.kill(pid!, 'SIGSTOP');
    holding.kill('SIGKILL');
    await holding.exit;
    await expectNothingLeft();
  });

  it('leaves it to the next run where its guardian has been killed, too', async () => {
    const { holding, folder } = await startHolder();
    const daemons = daemonsIn(folder);
    const guardians = processesWith(folder).filter(({ pid }) => !daemons.includes(pid));
    expect(guardians.length).toBeGreaterThan(0);
    kill(...guardians.map(({ pid }) => pid), holding.pid);
    await holding.exit;
    expect(daemonsIn(folder)).toEqual(daemons);
    await using daemon = await StorageDaemon.start();
    expect(daemonsIn(folder)).toEqual([]);
    expect(readdirSync(tmpdir())).toEqual([dirname(daemon.qmp.name).split('/').at(-1)]);
  });

  it('is told by its folder from one that works on', async () => {
    const { holding, folder } = await startHolder();
    const daemons = daemonsIn(folder);
    {
      await using _daemon = await StorageDaemon.start();
    }
    expect(daemonsIn(folder)).toEqual(daemons);
    holding.kill();
    await holding.exit;
  });
});

const APART = ['unshare', '--pid', '--fork', '--mount-proc', '--kill-child'];
const inFirst = readlinkSync('/proc/self/ns/pid') === 'pid:[4026531836]';

/** Processes have other ids in there, and others are not seen. */
describe.runIf(withDaemon && requires({ root: true, tools: ['unshare'] }))('a thicken in another namespace of process ids', () => {
  it('keeps its daemon when one out here starts another', async () => {
    const { holding, folder } = await startHolder(APART);
    const daemons = daemonsIn(folder);
    expect(daemons).toHaveLength(1);
    {
      await using _daemon = await StorageDaemon.start();
    }
    expect(daemonsIn(folder)).toEqual(daemons);
    expect(readdirSync(folder).sort()).toEqual(['nbd.sock', 'qmp.sock']);
    const inside = processesWith(holder).find(({ args }) => args[0] === process.execPath);
    process.kill(inside!.pid, 'SIGTERM');
    await holding.exit;
  });

  it('leaves the daemon of one out here alone', async () => {
    await using daemon = await StorageDaemon.start();
    const daemons = daemonsIn(tmpdir());
    const { holding } = await startHolder(APART);
    expect(await daemon.qmp.execute('query-block-exports')).toEqual([]);
    expect(daemonsIn(tmpdir())).toEqual(expect.arrayContaining(daemons));
    const inside = processesWith(holder).find(({ args }) => args[0] === process.execPath);
    process.kill(inside!.pid, 'SIGTERM');
    await holding.exit;
  });

  // From within a container nobody can tell.
  if (inFirst) {
    it('that has ended with all in it leaves what the next run removes', async () => {
      const { holding, folder } = await startHolder(APART);
      // They could see their user go, and tidy up, in the moment before they are ended with all.
      for (const { pid } of processesWith(folder)) process.kill(pid, 'SIGSTOP');
      holding.kill('SIGKILL');
      await waitFor('all in it to end', () => [folder, holder].every((text) => processesWith(text).length === 0));
      expect(readdirSync(folder).length).toBeGreaterThan(0);
      await using daemon = await StorageDaemon.start();
      expect(readdirSync(tmpdir())).toEqual([dirname(daemon.qmp.name).split('/').at(-1)]);
    });
  }
});
