import { getEventListeners } from 'node:events';
import { afterEach, describe, expect, test } from 'vitest';
import { QmpClient, type ConnectOptions } from '../../lib/qmp/client.js';
import { listJobs } from '../../lib/qmp/job-control.js';
import { connectSocket } from '../../lib/qmp/transport.js';
import { scratchPath } from '../support/scratch.js';
import { fakeServer, GREETING, type Command, type FakeOptions, type FakeServer, type Peer } from './fake-server.js';

const opened: AsyncDisposable[] = [];
afterEach(async () => {
  for (const thing of opened.splice(0).reverse()) await thing[Symbol.asyncDispose]();
});

async function serverWith(options?: FakeOptions): Promise<FakeServer> {
  const server = await fakeServer(options);
  opened.push(server);
  return server;
}

/** A client of a server that says nothing by itself, and what the server sees of it. */
async function pair(options?: FakeOptions, connect?: ConnectOptions): Promise<{ client: QmpClient; peer: Peer }> {
  const server = await serverWith(options);
  const client = await QmpClient.connect(server.address, connect);
  opened.push(client);
  return { client, peer: server.peers[0]! };
}

const code = (name: string) => expect.objectContaining({ code: name });

describe('connecting', () => {
  test('greets, negotiates what is offered, and is ready', async () => {
    const { client } = await pair();
    expect(client.state).toBe('ready');
    expect(client.hasEvents).toBe(true);
    expect(client.peerPid()).toBe(process.pid);
  });

  test('over TCP, where the peer’s process can’t be told', async () => {
    const { client, peer } = await pair({ tcp: true, onCommand: ({ id }, { reply }) => reply(id, { name: 'vm' }) });
    expect(client.peerPid()).toBeNull();
    expect(await client.execute('query-name')).toEqual({ name: 'vm' });
    expect(peer.commands).toHaveLength(1);
  });

  test('a greeting in many lines and many pieces is one', async () => {
    const pretty = JSON.stringify(JSON.parse(GREETING), null, 4);
    const { client } = await pair({
      greeting: null,
      onConnection: ({ write }) => [...`${pretty}\r\n`].forEach((piece, i) => setTimeout(() => write(piece), i / 10)),
    });
    expect(client.state).toBe('ready');
  });

  test.each<[string, string, FakeOptions]>([
    ['MONITOR_BUSY', 'no greeting', { greeting: null }],
    ['QMP_TIMEOUT', 'no answer to qmp_capabilities', { negotiates: false }],
    ['QMP_PROTOCOL', 'a human monitor', { greeting: "QEMU 7.2.22 monitor - type 'help'\r\n(qemu) " }],
    ['QMP_PROTOCOL', 'two greetings', { greeting: GREETING + GREETING }],
    ['QMP_PROTOCOL', 'an event before the greeting', { greeting: `{"event": "STOP"}\n${GREETING}` }],
    ['QMP_PROTOCOL', 'a reply before the greeting', { greeting: `{"return": {}, "id": 1}\n` }],
    ['QMP_LOST', 'an end before the greeting', { greeting: null, onConnection: ({ socket }) => socket.end() }],
    ['QMP_LOST', 'an end within the greeting', { greeting: GREETING.slice(0, 40), onConnection: ({ socket }) => socket.end() }],
    ['QMP_LOST', 'an end instead of negotiation', { negotiates: false, onConnection: ({ socket }) => socket.end() }],
  ])('fails with %s on %s', async (expected, _, options) => {
    const server = await serverWith(options);
    await expect(QmpClient.connect(server.address, { timeoutMs: 300 })).rejects.toEqual(code(expected));
    // The socket is given back: the next client can have the monitor.
    await new Promise((resolve) => (server.peers[0]!.socket.closed ? resolve(0) : server.peers[0]!.socket.once('close', resolve)));
  });

  test('tells of a busy monitor what to do', async () => {
    const server = await serverWith({ greeting: null });
    await expect(QmpClient.connect(server.address, { timeoutMs: 50 })).rejects.toThrow(/another client.*--domain/);
  });

  test('fails with the errno’s name where nothing is there, nothing listens, or the address is none', async () => {
    await expect(QmpClient.connect(`unix:${scratchPath('absent')}`)).rejects.toMatchObject({ code: 'ENOENT', syscall: 'connect' });
    await expect(QmpClient.connect('127.0.0.1:1')).rejects.toEqual(code('ECONNREFUSED'));
    await expect(QmpClient.connect('nonsense')).rejects.toEqual(code('USAGE'));
  });

  test('can be cancelled before, and while it waits', async () => {
    const server = await serverWith({ greeting: null });
    const early = QmpClient.connect(server.address, { signal: AbortSignal.abort() });
    await expect(early).rejects.toEqual(code('CANCELLED'));
    const abort = new AbortController();
    const late = QmpClient.connect(server.address, { signal: abort.signal });
    setTimeout(() => abort.abort(), 20);
    await expect(late).rejects.toEqual(code('CANCELLED'));
    expect(getEventListeners(abort.signal, 'abort')).toEqual([]);
  });

  test('refuses to send before it is ready', async () => {
    const transport = await connectSocket((await serverWith({ greeting: null })).address);
    await expect(QmpClient.connect(transport, { timeoutMs: 20 })).rejects.toEqual(code('MONITOR_BUSY'));
    await expect(transport.send('{}')).rejects.toEqual(code('QMP_LOST'));
  });
});

describe('commands', () => {
  test('replies find their commands, in whatever order they come', async () => {
    const { client, peer } = await pair();
    const asked = [...'abcdef'].map((path) => client.execute('qom-list', { path }));
    const commands = await peer.received(6);
    for (const { id, arguments: args } of [...commands].reverse()) peer.reply(id, args);
    expect(await Promise.all(asked)).toEqual([...'abcdef'].map((path) => ({ path })));
  });

  test('an error carries QEMU’s class and words, and the command', async () => {
    const desc = 'Node \u001b[31m’x’ not found\n';
    const { client } = await pair({
      onCommand: ({ id }, { write }) => write(JSON.stringify({ id, error: { class: 'GenericError', desc } })),
    });
    const failing = client.execute('blockdev-del', { 'node-name': 'x' });
    await expect(failing).rejects.toMatchObject({ code: 'QMP_COMMAND', command: 'blockdev-del', qmpClass: 'GenericError', desc });
    // What may end up on a terminal has no control characters.
    await expect(failing).rejects.toThrow(/^blockdev-del failed on monitor ".*": Node \[31m’x’ not found; /);
  });

  test('go out of band where that was agreed on and is asked for', async () => {
    const { client, peer } = await pair({ onCommand: ({ id }, { reply }) => reply(id) });
    await client.executeAny('yank', {}, { oob: true });
    await client.executeAny('yank');
    expect(peer.commands.map(({ oob }) => oob)).toEqual([true, false]);
    const plain = await pair({ greeting: '{"QMP": {"version": {}, "capabilities": []}}', onCommand: ({ id }, { reply }) => reply(id) });
    await plain.client.executeAny('yank', {}, { oob: true });
    expect(plain.peer.commands.map(({ oob }) => oob)).toEqual([false]);
  });

  test('that are given up leave the connection as it is; a late reply is told to who asked for that', async () => {
    const { client, peer } = await pair();
    const late: unknown[] = [];
    const abort = new AbortController();
    const slow = client.execute('query-name', {}, { timeoutMs: 10, late: (value) => late.push(value) });
    const cancelled = client.execute('query-name', {}, { signal: abort.signal, late: (value) => late.push(value) });
    const failed = client.execute('query-name', {}, { timeoutMs: 10, late: (value) => late.push(value) });
    await peer.received(3);
    abort.abort();
    await expect(cancelled).rejects.toEqual(code('CANCELLED'));
    await expect(slow).rejects.toMatchObject({ code: 'QMP_TIMEOUT', command: 'query-name' });
    await expect(failed).rejects.toEqual(code('QMP_TIMEOUT'));
    const [first, second, third] = peer.commands;
    peer.reply(second!.id, 'two');
    peer.reply(first!.id, 'one');
    peer.write(JSON.stringify({ id: third!.id, error: { class: 'GenericError', desc: 'no' } }));
    const next = client.execute('query-status');
    peer.reply((await peer.received(4))[3]!.id, 'three');
    expect(await next).toBe('three');
    expect(late).toEqual(['two', 'one']);
  });

  test('are not sent where they are cancelled already', async () => {
    const { client, peer } = await pair({ onCommand: ({ id }, { reply }) => reply(id) });
    const signal = AbortSignal.abort('because');
    const refused = client.execute('job-cancel', { id: 'x' }, { signal });
    await expect(refused).rejects.toMatchObject({ code: 'CANCELLED', cause: 'because' });
    await client.execute('query-name');
    expect(peer.commands.map(({ execute }) => execute)).toEqual(['query-name']);
  });

  test('leave no listener on the caller’s signal, and no timer', async () => {
    const { client } = await pair({ onCommand: ({ id }, { reply }) => reply(id) });
    const { signal } = new AbortController();
    const asked = Array.from({ length: 20 }, () => client.execute('query-name', {}, { signal }));
    expect(getEventListeners(signal, 'abort')).toHaveLength(20);
    await Promise.all(asked);
    expect(getEventListeners(signal, 'abort')).toEqual([]);
  });

  test('that can’t be put into JSON reject, and take no id', async () => {
    const { client } = await pair({ onCommand: ({ id }, { reply }) => reply(id) });
    await expect(client.executeAny('x', { n: 1n })).rejects.toThrow(/BigInt/);
    await client.execute('query-name');
  });

  test('are limited in number while no answer comes, given-up ones included', async () => {
    const { client } = await pair();
    const asked = Array.from({ length: 1024 }, () => client.execute('query-name', {}, { timeoutMs: 50 }));
    await expect(client.execute('query-name')).rejects.toEqual(code('QMP_BUSY'));
    const settled = await Promise.allSettled(asked);
    expect(new Set(settled.map(({ status }) => status))).toEqual(new Set(['rejected']));
    await expect(client.execute('query-name')).rejects.toEqual(code('QMP_BUSY'));
  });
});

describe('a peer that breaks the protocol', () => {
  test.each([
    ['a reply nobody asked for', '{"return": {}, "id": 999}'],
    ['a second answer', '{"return": {}, "id": 1}'],
    ['an answer without id', '{"return": {}}'],
    ['return and error at once', '{"return": {}, "error": {"class": "a", "desc": "b"}, "id": 2}'],
    ['another greeting', GREETING],
    ['no JSON', 'hello\n'],
    ['a JSON fault', '{"return": }'],
    ['deep nesting', `{"return": ${'['.repeat(2000)}`],
    ['an error about no command', '{"error": {"class": "GenericError", "desc": "JSON parse error"}}'],
  ])('is left: %s', async (_, message) => {
    const { client, peer } = await pair();
    const waiting = client.execute('query-name');
    await peer.received(1);
    peer.write(message);
    await expect(waiting).rejects.toEqual(code('QMP_PROTOCOL'));
    expect(await client.onLost).toEqual(code('QMP_PROTOCOL'));
    expect(client.state).toBe('lost');
    await expect(client.execute('query-name')).rejects.toEqual(code('QMP_PROTOCOL'));
  });

  test('a message without end is cut off, in bounded memory', async () => {
    const { client, peer } = await pair();
    const waiting = client.execute('query-name');
    await peer.received(1);
    const before = process.memoryUsage().arrayBuffers;
    let most = 0;
    const piece = Buffer.alloc(2 ** 20, 'x');
    const pour = (): void => {
      most = Math.max(most, process.memoryUsage().arrayBuffers - before);
      if (!peer.socket.destroyed) peer.socket.write(piece, () => setImmediate(pour));
    };
    peer.write('{"return": "');
    pour();
    await expect(waiting).rejects.toThrow(/more than 67108864 bytes/);
    expect(most).toBeGreaterThan(32 * 2 ** 20);
    // The buffer twice while it doubles, and the chunks that the collector has not seen yet.
    expect(most).toBeLessThan(256 * 2 ** 20);
  });
});

describe('a connection that is lost', () => {
  test('rejects all that waits, once, each with QMP_LOST', async () => {
    const { client, peer } = await pair();
    const stream = client.events('STOP');
    const waiting = [
      client.execute('query-name'),
      client.execute('query-status', {}, { timeoutMs: Infinity }),
      client.waitFor('STOP'),
      stream.next(),
      client.supports('query-name'),
    ];
    await peer.received(3);
    peer.write('{"return": {"half": ');
    peer.socket.end();
    for (const each of await Promise.allSettled(waiting)) {
      expect(each).toMatchObject({ status: 'rejected', reason: { code: 'QMP_LOST' } });
    }
    expect(await client.onLost).toMatchObject({ message: expect.stringContaining('in the middle of a message') });
    await expect(client.execute('query-name')).rejects.toEqual(code('QMP_LOST'));
    await client.close();
    expect(client.state).toBe('lost');
  });

  test('ends nothing else where nobody awaits it', async () => {
    const unhandled: unknown[] = [];
    const note = (reason: unknown) => unhandled.push(reason);
    process.on('unhandledRejection', note);
    try {
      const { client, peer } = await pair();
      void client.execute('query-name');
      void client.waitFor('STOP');
      void client.events('STOP').next();
      void client.supports('query-name');
      void client.supportsArgument('a', 'b');
      await peer.received(2);
      peer.socket.destroy();
      await client.onLost;
      void client.execute('query-name');
      void client.waitFor('STOP');
      await new Promise((resolve) => setTimeout(resolve, 20));
      expect(unhandled).toEqual([]);
    } finally {
      process.off('unhandledRejection', note);
    }
  });
});

describe('closing', () => {
  test('rejects what waits with CLOSED, ends events, and is done when the socket is', async () => {
    const { client, peer } = await pair();
    const waiting = client.execute('query-name');
    const event = client.waitFor('STOP');
    const stream = client.events('STOP').next();
    await peer.received(1);
    const closing = client.close();
    expect(client.state).toBe('closing');
    expect(client.close()).toBe(closing);
    await expect(waiting).rejects.toEqual(code('CLOSED'));
    await expect(event).rejects.toEqual(code('CLOSED'));
    expect((await stream).done).toBe(true);
    await closing;
    expect(client.state).toBe('closed');
    expect(await client.onLost).toBeNull();
    await expect(client.execute('query-name')).rejects.toEqual(code('CLOSED'));
    await client[Symbol.asyncDispose]();
  });

  test('delivers what was sent before', async () => {
    const { client, peer } = await pair();
    void client.execute('job-cancel', { id: 'x'.repeat(100_000) });
    await client.close();
    expect((await peer.received(1))[0]?.arguments['id']).toHaveLength(100_000);
  });

  test('does not wait for a peer that reads nothing', async () => {
    const { client, peer } = await pair();
    peer.socket.pause();
    void client.execute('job-cancel', { id: 'x'.repeat(8_000_000) });
    await client.close();
    expect(client.state).toBe('closed');
  });
});

describe('support', () => {
  const commands = [{ name: 'known' }];
  const schema = [{ 'meta-type': 'command', name: 'known', 'arg-type': '1' }, { 'meta-type': 'object', name: '1', members: [{ name: 'x', type: 'int' }] }];

  test('is asked for once', async () => {
    const { client, peer } = await pair({
      onCommand: ({ id, execute }, { reply }) => reply(id, execute === 'query-commands' ? commands : schema),
    });
    const asked = () => [client.supports('known'), client.supports('other'), client.supportsArgument('known', 'x')];
    expect(await Promise.all([...asked(), ...asked()])).toEqual([true, false, true, true, false, true]);
    expect(peer.commands.map(({ execute }) => execute).sort()).toEqual(['query-commands', 'query-qmp-schema']);
  });

  test('is asked for again after a failure; nonsense is an error', async () => {
    const replies: unknown[] = ['nonsense', [{ name: 'other' }, null, 7], 'nonsense', schema];
    const { client } = await pair({ onCommand: ({ id }, { reply }) => reply(id, replies.shift()) });
    await expect(client.supports('known')).rejects.toEqual(code('QMP_PROTOCOL'));
    expect(await client.supports('known')).toBe(false);
    await expect(client.supportsArgument('known', 'x')).rejects.toEqual(code('QMP_PROTOCOL'));
    expect(await client.supportsArgument('known', 'x')).toBe(true);
  });
});

describe('lists of jobs', () => {
  const names = ['query-jobs', 'query-block-jobs', 'x-debug-query-block-graph'];
  const commands = names.map((name) => ({ name }));
  const running = { id: 'j', type: 'create', status: 'running', 'current-progress': 1, 'total-progress': 2 };

  /** A server that has one job, and no graph. */
  const answer = ({ execute, id }: Command, { reply, write }: Peer): void => {
    if (execute === 'query-commands') reply(id, commands);
    else if (execute === 'query-jobs') reply(id, [running]);
    else if (execute === 'query-block-jobs') reply(id, []);
    else write(JSON.stringify({ id, error: { class: 'GenericError', desc: 'no' } }));
  };

  test('know jobs that are no block jobs, and do without the graph', async () => {
    const { client } = await pair({ onCommand: answer });
    expect(await listJobs(client, { sampleMs: 1 })).toEqual([
      { id: 'j', type: 'create', device: null, status: 'running', position: 1, total: 2, speed: null, secondsLeft: null },
    ]);
  });

  test.each([{}, null, [1], [{ id: 1, status: 'running' }], [{ id: 'j' }]])('that are %j are refused', async (jobs) => {
    const onCommand = (command: Command, peer: Peer) =>
      command.execute === 'query-jobs' ? peer.reply(command.id, jobs) : answer(command, peer);
    const { client } = await pair({ onCommand });
    await expect(listJobs(client)).rejects.toEqual(code('QMP_PROTOCOL'));
  });
});
