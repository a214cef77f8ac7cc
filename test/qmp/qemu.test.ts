/** The client against the QEMUs that are installed: a storage daemon and an emulator. */
import { createConnection } from 'node:net';
import { once } from 'node:events';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { QmpClient } from '../../lib/qmp/client.js';
import { mustRun, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { MiB, openQemu, relayedBy, withoutEvents, type Opened } from './images.js';

const code = (name: string) => expect.objectContaining({ code: name });

async function emptyImage(): Promise<string> {
  const file = scratchPath('empty.qcow2');
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', file, '8M']);
  return file;
}

const here = requires({ tools: ['qemu-img', 'qemu-storage-daemon', 'qemu-system-x86_64'] });

describe.runIf(here).each(['daemon', 'guest'] as const)('a %s', (kind) => {
  let qemu: Opened;
  let client: QmpClient;

  beforeAll(async () => {
    qemu = await openQemu(await emptyImage(), kind);
    ({ client } = qemu);
  });
  afterAll(() => qemu[Symbol.asyncDispose]());

  test('greets, and tells its version and process', async () => {
    const { qemu: version } = await client.execute('query-version');
    expect(version.major).toBeGreaterThanOrEqual(5);
    expect(client.peerPid()).toBe(qemu.pid);
  });

  test('describes itself', async () => {
    expect(await client.supports('block-stream')).toBe(true);
    expect(await client.supports('no-such-command')).toBe(false);
    // What the two have in common, and what the daemon lacks.
    expect(await client.supports('query-status')).toBe(kind === 'guest');
    expect(await client.supportsArgument('block-export-add', 'allocation-depth')).toBe(true);
    expect(await client.supportsArgument('block-export-add', 'node-name')).toBe(true);
    expect(await client.supportsArgument('blockdev-add', 'file.filename')).toBe(true);
    expect(await client.supportsArgument('blockdev-add', 'backing.backing.file.driver', 'nbd')).toBe(true);
    expect(await client.supportsArgument('blockdev-reopen', 'options.backing')).toBe(true);
    expect(await client.supportsArgument('block-stream', 'on-error', 'enospc')).toBe(true);
    expect(await client.supportsArgument('block-stream', 'on-error', 'panic')).toBe(false);
    expect(await client.supportsArgument('block-stream', 'allocation-depth')).toBe(false);
  });

  test('answers what it can’t do with its class and words', async () => {
    const unknown = client.executeAny('no-such-command');
    await expect(unknown).rejects.toMatchObject({ code: 'QMP_COMMAND', qmpClass: 'CommandNotFound', command: 'no-such-command' });
    const absent = client.execute('blockdev-del', { 'node-name': 'absent' });
    await expect(absent).rejects.toMatchObject({ code: 'QMP_COMMAND', qmpClass: 'GenericError', desc: expect.stringContaining('absent') });
  });

  test('answers many commands at once, each its own', async () => {
    const asked = Array.from({ length: 200 }, (_, i) =>
      i % 3 === 0 ? client.execute('query-version') : client.execute('qom-list', { path: '/' }),
    );
    const replies = await Promise.all(asked);
    expect(replies.filter((reply) => 'qemu' in reply)).toHaveLength(67);
    expect(replies.filter(Array.isArray)).toHaveLength(133);
  });

  test('tells of nodes and devices', async () => {
    const nodes = await client.execute('query-named-block-nodes', { flat: true });
    expect(nodes.find((node) => node['node-name'] === 'disk')).toMatchObject({ drv: 'qcow2', image: { 'virtual-size': 8 * MiB } });
    const devices = await client.execute('query-block');
    expect(devices.map(({ qdev }) => qdev).filter(Boolean)).toHaveLength(kind === 'guest' ? 1 : 0);
  });

  test('sends events to who waits for them', async () => {
    const add = { driver: 'null-co', 'node-name': 'short' };
    await client.execute('blockdev-add', add);
    if (kind === 'daemon') await client.execute('block-export-add', { type: 'nbd', id: 'e', 'node-name': 'short' });
    const name = kind === 'daemon' ? 'BLOCK_EXPORT_DELETED' : 'RESUME';
    const stream = client.events(name);
    const waiting = client.waitFor((event) => event.name === name);
    if (kind === 'daemon') await client.execute('block-export-del', { id: 'e' });
    else await client.executeAny('cont');
    const event = await waiting;
    expect((await stream.next()).value).toEqual(event);
    expect(event.timestamp).toBeGreaterThan(1.5e12);
    await client.execute('blockdev-del', { 'node-name': 'short' });
  });

  test('serves one client: the next ones are told that it is busy', async () => {
    await expect(QmpClient.connect(qemu.address, { timeoutMs: 300 })).rejects.toEqual(code('MONITOR_BUSY'));
    // Who waits fills the socket's queue, until the kernel sends the next away with EAGAIN.
    const waiting = Array.from({ length: 4 }, () => createConnection(qemu.address.slice('unix:'.length)));
    const away = waiting.map((socket) => new Promise<string>((resolve) => socket.once('error', ({ message }) => resolve(message))));
    expect(await Promise.race(away)).toContain('EAGAIN');
    await expect(QmpClient.connect(qemu.address, { timeoutMs: 300 })).rejects.toEqual(code('MONITOR_BUSY'));
    for (const socket of waiting) socket.destroy();
    expect((await client.execute('query-version')).qemu).toBeDefined();
  });

  test('serves the next client once the first has closed', async () => {
    await client.close();
    client = await QmpClient.connect(qemu.address);
    expect(await client.execute('query-version')).toBeDefined();
    await client.close();
  });
});

describe.runIf(here)('a QEMU that goes away', () => {
  test.each(['daemon', 'guest'] as const)('a killed %s rejects everything with QMP_LOST', async (kind) => {
    await using qemu = await openQemu(await emptyImage(), kind);
    const { client, pid } = qemu;
    process.kill(pid, 'SIGSTOP');
    const waiting = [
      ...Array.from({ length: 20 }, () => client.execute('query-block', {}, { timeoutMs: Infinity })),
      client.supports('block-stream'),
      client.waitFor('STOP'),
    ];
    process.kill(pid, 'SIGKILL');
    for (const each of await Promise.allSettled(waiting)) {
      expect(each).toMatchObject({ status: 'rejected', reason: { code: 'QMP_LOST' } });
    }
    expect(client.state).toBe('lost');
    expect(await client.onLost).toEqual(code('QMP_LOST'));
  });

  test('one that is stopped times out, and its late answers do no harm', async () => {
    await using qemu = await openQemu(await emptyImage());
    const { client, pid } = qemu;
    const late = new Promise((resolve) => {
      process.kill(pid, 'SIGSTOP');
      void client.execute('query-version', {}, { timeoutMs: 50, late: resolve });
    });
    const abort = new AbortController();
    const cancelled = client.execute('query-jobs', {}, { signal: abort.signal });
    await expect(client.execute('query-jobs', {}, { timeoutMs: 100 })).rejects.toEqual(code('QMP_TIMEOUT'));
    abort.abort();
    await expect(cancelled).rejects.toEqual(code('CANCELLED'));
    process.kill(pid, 'SIGCONT');
    expect(await client.execute('query-jobs')).toEqual([]);
    expect(await late).toHaveProperty('qemu');
  });

  test('one that quits answers first', async () => {
    await using qemu = await openQemu(await emptyImage());
    expect(await qemu.client.executeAny('quit')).toEqual({});
    expect(await qemu.client.onLost).toEqual(code('QMP_LOST'));
  });
});

describe.runIf(here)('a monitor of another kind', () => {
  test('a human one is told apart', async () => {
    const path = scratchPath('human');
    await using qemu = start('qemu-system-x86_64', [
      ...['-machine', 'none', '-nodefaults', '-display', 'none'],
      ...['-monitor', `unix:${path},server=on,wait=off`],
    ]);
    await waitFor('the human monitor', () => QmpClient.connect(path, { timeoutMs: 5000 }).then(
      () => Promise.reject(new Error('that was no human monitor')),
      (error: { code: string }) => error.code === 'QMP_PROTOCOL',
    ));
    expect(qemu.child.exitCode).toBeNull();
  });

  test('a pretty one is understood', async () => {
    const path = scratchPath('pretty');
    await using qemu = start('qemu-system-x86_64', [
      ...['-machine', 'none', '-nodefaults', '-display', 'none'],
      ...['-chardev', `socket,id=q,path=${path},server=on,wait=off`, '-mon', 'chardev=q,mode=control,pretty=on'],
    ]);
    const client = await waitFor('the monitor', () =>
      QmpClient.connect(path, { timeoutMs: 5000 }).catch(() => undefined),
    );
    expect(await client.execute('query-status')).toMatchObject({ running: expect.any(Boolean) });
    expect(await client.supports('block-stream')).toBe(true);
    await client.close();
    qemu.kill('SIGKILL');
    await once(qemu.child, 'close');
  });
});

describe.runIf(here)('without events', () => {
  test('waiting for one is refused, and streams stay empty', async () => {
    await using qemu = await openQemu(await emptyImage(), 'daemon', withoutEvents);
    const { client } = qemu;
    expect(client.hasEvents).toBe(false);
    await expect(client.waitFor('STOP')).rejects.toEqual(code('UNSUPPORTED'));
    const stream = client.events('STOP');
    await client.close();
    expect((await stream.next()).done).toBe(true);
  });

  test('commands go through somebody who owns the monitor', async () => {
    await using qemu = await openQemu(await emptyImage());
    await using client = await QmpClient.connect(relayedBy(qemu.client));
    expect(client.state).toBe('ready');
    expect(await client.supports('block-stream')).toBe(true);
    await expect(client.executeAny('no-such-command')).rejects.toMatchObject({ qmpClass: 'CommandNotFound' });
    process.kill(qemu.pid, 'SIGKILL');
    expect(await client.onLost).toEqual(code('QMP_LOST'));
  });
});
