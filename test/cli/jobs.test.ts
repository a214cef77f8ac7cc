/** jobs, pause, resume, cancel and set-speed, against real storage daemons and bad peers. */
import { once } from 'node:events';
import { describe, expect, test } from 'vitest';
import { listJobs, QmpClient, steerJob, type JobEntry } from '../../lib/index.js';
import { fakeServer, type Command, type FakeOptions, type Peer } from '../qmp/fake-server.js';
import { MiB } from '../qmp/images.js';
import { CRAWL, daemonWith, STREAM_SIZE } from '../qmp/streams.js';
import { cli, spawnCli, type Outcome, type Qemu } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { waitFor } from '../support/wait.js';

const here = requires({ tools: ['qemu-img', 'qemu-storage-daemon'] });

/** What QEMU itself says, on a connection that is gone afterwards. */
async function rowsOf(qemu: Qemu) {
  await using client = await QmpClient.connect(qemu.qmp);
  return await client.execute('query-block-jobs');
}

async function rowOf(qemu: Qemu, id: string) {
  return (await rowsOf(qemu)).find(({ device }) => device === id);
}

function documentOf<T>({ stdout }: Outcome): T {
  expect(stdout.endsWith('\n')).toBe(true);
  return JSON.parse(stdout) as T;
}

interface Failure {
  error: { code: string; message: string };
}

function expectDone(outcome: Outcome, stdout: string): void {
  expect([outcome.status, outcome.stderr, outcome.stdout]).toEqual([0, '', stdout]);
}

async function expectFailure(args: string[], status: number, code: string, words = /./): Promise<void> {
  const outcome = await cli([...args, '--json']);
  const { error, ...rest } = documentOf<Failure>(outcome);
  expect([outcome.status, error.code, rest]).toEqual([status, code, {}]);
  expect(error.message).toMatch(words);
  expect(outcome.stderr).toBe(`thicken: ${code}: ${error.message}\n`);
}

describe.runIf(here)('jobs', () => {
  test('--json has the fields of the contract, one entry for each job', async () => {
    await using qemu = await daemonWith('first', 'second');
    const outcome = await cli(['jobs', '--qmp', qemu.qmp, '--json']);
    const entry = (id: string, device: string) => ({
      ...{ id, type: 'stream', device, status: 'running' },
      ...{ position: expect.any(Number), total: STREAM_SIZE, speed: CRAWL },
    });
    const entries = documentOf<JobEntry[]>(outcome);
    for (const { secondsLeft } of entries) expect(['number', 'object']).toContain(typeof secondsLeft);
    const sorted = entries.map(({ secondsLeft: _, ...rest }) => rest).sort((a, b) => (a.id < b.id ? -1 : 1));
    expect(sorted).toEqual([entry('first', 'disk'), entry('second', 'disk1')]);
    for (const each of entries) {
      const fields = ['id', 'type', 'device', 'status', 'position', 'total', 'speed', 'secondsLeft'];
      expect(Object.keys(each)).toEqual(fields);
    }
    expect([outcome.status, outcome.stderr]).toEqual([0, '']);
  });

  test('for people is a table with percentages and the time left', async () => {
    await using qemu = await daemonWith('stream0');
    const moving = /^stream0 +stream +disk +running +\d+\.\d% +64 MiB +256 KiB\/s +\d+(:\d\d)+$/;
    await waitFor('a time left', async () => {
      const { status, stderr, stdout } = await cli(['jobs', '--qmp', qemu.qmp]);
      expect([status, stderr]).toEqual([0, '']);
      const [head = '', row = '', ...more] = stdout.split('\n');
      expect(head).toMatch(/^id +type +device +status +done +of +limit +left$/);
      expect(row).toMatch(/^stream0 /);
      expect(more).toEqual(['']);
      return moving.test(row);
    });
    await cli(['pause', '--qmp', qemu.qmp]);
    await cli(['set-speed', '--qmp', qemu.qmp, 'none']);
    await waitFor('it to be paused', async () => (await rowOf(qemu, 'stream0'))?.status === 'paused');
    const { stdout } = await cli(['jobs', '--qmp', qemu.qmp]);
    expect(stdout).toMatch(/^stream0 +stream +disk +paused +\d+\.\d% +64 MiB +none +-$/m);
  });

  test('says so where there are none', async () => {
    await using qemu = await daemonWith();
    expectDone(await cli(['jobs', '--qmp', qemu.qmp]), 'no jobs\n');
    expectDone(await cli(['jobs', '--qmp', `unix:${qemu.qmp}`, '--json']), '[]\n');
  });
});

describe.runIf(here)('steering', () => {
  test('pauses and resumes, also what is that way already', async () => {
    await using qemu = await daemonWith('stream0');
    const at = ['--qmp', qemu.qmp];
    expectDone(await cli(['pause', ...at, 'stream0']), 'stream0: paused\n');
    await waitFor('it to be paused', async () => (await rowOf(qemu, 'stream0'))?.status === 'paused');
    expectDone(await cli(['pause', ...at, '--json']), '{"id":"stream0","action":"pause"}\n');
    expect(await rowOf(qemu, 'stream0')).toMatchObject({ paused: true, status: 'paused' });
    expectDone(await cli(['resume', ...at, '--json', 'stream0']), '{"id":"stream0","action":"resume"}\n');
    expectDone(await cli(['resume', ...at]), 'stream0: resumed\n');
    expect(await rowOf(qemu, 'stream0')).toMatchObject({ paused: false, status: 'running' });
  });

  test('limits the speed, and lifts the limit', async () => {
    await using qemu = await daemonWith('stream0');
    const at = ['--qmp', qemu.qmp];
    expectDone(await cli(['set-speed', ...at, 'stream0', '128k']), 'stream0: at most 128 KiB/s\n');
    expect(await rowOf(qemu, 'stream0')).toMatchObject({ speed: 128 * 1024 });
    const json = await cli(['set-speed', ...at, '--json', '300K/s']);
    expectDone(json, `{"id":"stream0","action":"set-speed","speed":${300 * 1024}}\n`);
    expect(await rowOf(qemu, 'stream0')).toMatchObject({ speed: 300 * 1024 });
    // Paused, so that it does not reach its end before it is looked at.
    await cli(['pause', ...at]);
    const lifted = await cli(['set-speed', ...at, '--json', 'stream0', 'none']);
    expectDone(lifted, '{"id":"stream0","action":"set-speed","speed":null}\n');
    expect(await rowOf(qemu, 'stream0')).toMatchObject({ speed: 0 });
    expectDone(await cli(['set-speed', ...at, 'none']), 'stream0: no limit\n');
    await cli(['resume', ...at]);
    await waitFor('it to end', async () => (await rowsOf(qemu)).length === 0, { timeout: 60_000 });
  });

  test('cancels, and the job is gone by then', async () => {
    await using qemu = await daemonWith('first', 'second');
    const at = ['--qmp', qemu.qmp];
    expectDone(await cli(['cancel', ...at, 'first']), 'first: cancelled\n');
    expect((await rowsOf(qemu)).map(({ device }) => device)).toEqual(['second']);
    expectDone(await cli(['cancel', ...at, '--json']), '{"id":"second","action":"cancel"}\n');
    await using client = await QmpClient.connect(qemu.qmp);
    expect(await client.execute('query-jobs')).toEqual([]);
    const nodes = await client.execute('query-named-block-nodes', { flat: true });
    expect(nodes.find((node) => node['node-name'] === 'disk')?.image['backing-filename']).toMatch(/base\.raw$/);
  });

  test('cancels what has ended, and that nobody dismisses', async () => {
    await using qemu = await daemonWith();
    const client = await QmpClient.connect(qemu.qmp);
    const ended = client.waitFor(({ name, data }) => name === 'JOB_STATUS_CHANGE' && data['status'] === 'concluded');
    await client.execute('block-stream', { 'job-id': 'orphan', device: 'disk', 'auto-dismiss': false });
    await ended;
    await client.close();
    await expectFailure(['pause', '--qmp', qemu.qmp, 'orphan'], 1, 'QMP_COMMAND', /job-pause failed/);
    expectDone(await cli(['cancel', '--qmp', qemu.qmp, 'orphan']), 'orphan: cancelled\n');
    expectDone(await cli(['jobs', '--qmp', qemu.qmp]), 'no jobs\n');
  });
});

describe.runIf(here)('a job', () => {
  const VERBS = ['pause', 'resume', 'cancel', 'set-speed'];
  const rate = (verb: string) => (verb === 'set-speed' ? ['1M'] : []);

  test.each(VERBS)('must be named to %s it where there are several, or none', async (verb) => {
    await using qemu = await daemonWith('first', 'second');
    const args = [verb, '--qmp', qemu.qmp, ...rate(verb)];
    await expectFailure(args, 2, 'USAGE', /no job is named.*name one of 2: ("first", "second"|"second", "first")$/);
    const untouched = (await rowsOf(qemu)).map(({ paused, speed }) => ({ paused, speed }));
    expect(untouched).toEqual([{ paused: false, speed: CRAWL }, { paused: false, speed: CRAWL }]);
    await cli(['cancel', '--qmp', qemu.qmp, 'first']);
    await cli(['cancel', '--qmp', qemu.qmp, 'second']);
    await expectFailure(args, 2, 'USAGE', /no job is named.*there are no jobs at all$/);
  });

  test('that QEMU does not know is UNKNOWN_JOB, whatever is to be done', async () => {
    await using qemu = await daemonWith('stream0');
    for (const verb of VERBS) {
      const args = [verb, '--qmp', qemu.qmp, 'other', ...rate(verb)];
      await expectFailure(args, 1, 'UNKNOWN_JOB', /no job "other".*there is "stream0"$/);
    }
    expect(await rowOf(qemu, 'stream0')).toMatchObject({ paused: false, speed: CRAWL });
  });
});

const COMMANDS = [['jobs'], ['pause'], ['resume'], ['cancel'], ['set-speed', '1M']];

describe('wrong usage', () => {
  test.each(COMMANDS)('no --qmp for %s', async (...args) => {
    await expectFailure(args, 2, 'USAGE', /--qmp/);
  });

  test.each([
    ['set-speed'],
    ['set-speed', '0'],
    ['set-speed', 'stream0'],
    ['set-speed', 'stream0', 'fast'],
    ['set-speed', 'stream0', '1M', '2M'],
    ['set-speed', '-1'],
    ['jobs', 'stream0'],
    ['pause', 'stream0', 'stream1'],
    ['cancel', '--format', 'raw'],
  ])('%s %s %s %s', async (command, ...args) => {
    // There is nothing at that address: usage is looked at first.
    await expectFailure([command, '--qmp', '/nonexistent/qmp', ...args], 2, 'USAGE');
  });

  test('an address that is none', async () => {
    await expectFailure(['jobs', '--qmp', 'nowhere'], 2, 'USAGE', /no address of a monitor/);
  });
});

describe('a monitor', () => {
  test.each(COMMANDS)('that is not there is ENOENT for %s', async (...args) => {
    await expectFailure([...args, '--qmp', '/nonexistent/qmp'], 1, 'ENOENT', /can't connect/);
  });

  test.runIf(here)('whose QEMU is dead is ECONNREFUSED', async () => {
    const qemu = await daemonWith();
    await qemu.dispose();
    await expectFailure(['jobs', '--qmp', qemu.qmp], 1, 'ECONNREFUSED', /can't connect/);
  });

  test.runIf(here)('that serves somebody else is MONITOR_BUSY', async () => {
    await using qemu = await daemonWith('stream0');
    await using client = await QmpClient.connect(qemu.qmp);
    for (const args of [['jobs'], ['cancel', 'stream0']]) {
      await expectFailure([...args, '--qmp', qemu.qmp], 1, 'MONITOR_BUSY', /one at a time/);
    }
    expect(await client.execute('query-jobs')).toMatchObject([{ id: 'stream0', status: 'running' }]);
  });

  test.each(COMMANDS)('that speaks something else is QMP_PROTOCOL for %s', async (...args) => {
    await using server = await fakeServer({ greeting: 'SSH-2.0-OpenSSH_9.2\r\n' });
    await expectFailure([...args, '--qmp', server.address], 1, 'QMP_PROTOCOL', /is no QMP/);
  });

  test('that goes away is QMP_LOST', async () => {
    await using server = await fakeServer({ onCommand: (_, peer) => peer.socket.destroy() });
    await expectFailure(['jobs', '--qmp', server.address], 1, 'QMP_LOST');
  });
});

test('of many jobs the error lists the first twenty, and how many there are', async () => {
  const job = (_: unknown, i: number) => ({ id: `job${i}`, type: 'stream', status: 'running' });
  const all = Array.from({ length: 21 }, job);
  await using server = await fakeServer({
    onCommand: ({ id, execute }, peer) => peer.reply(id, execute === 'query-jobs' ? all : []),
  });
  await expectFailure(['cancel', '--qmp', server.address], 2, 'USAGE', /one of 21: "job0", .*"job19", …$/);
});

const WILD = 'a\u001b[31m\nb\u009b2J\u202ec';
const GRAPH = 'x-debug-query-block-graph';

/** A peer with one job, whose words are as wild as QEMU's never are. */
function wildReply(command: Command): unknown {
  const job = { id: WILD, type: WILD, status: WILD, 'current-progress': 5, 'total-progress': 8 };
  switch (command.execute) {
    case 'query-commands':
      return [{ name: GRAPH }];
    case GRAPH:
      return {
        nodes: [{ id: 1, name: WILD, type: 'block-job' }, { id: 2, name: `${WILD}d`, type: 'block-driver' }],
        edges: [{ parent: 1, child: 2, name: 'main node' }],
      };
    case 'query-jobs':
      return [job];
    case 'query-block-jobs':
      return [];
    default:
      return {};
  }
}

describe('control characters that a peer sends', () => {
  const wild = () => fakeServer({ onCommand: (command, peer) => peer.reply(command.id, wildReply(command)) });
  const withoutNewlines = (text: string) => text.replaceAll('\n', '');

  test('reach no terminal', async () => {
    await using server = await wild();
    const listed = await cli(['jobs', '--qmp', server.address]);
    expect(listed.stdout).toMatch(/^a \[31m b 2J c +a \[31m b 2J c +a \[31m b 2J cd +a \[31m b 2J c +62\.5% +8 B +none +-$/m);
    const paused = await cli(['pause', '--qmp', server.address]);
    expect(paused.stdout).toBe('a [31m b 2J c: paused\n');
    for (const { stdout } of [listed, paused]) expect(withoutNewlines(stdout)).not.toMatch(/\p{Cc}|\p{Cf}/u);
  });

  test('come back from JSON as they were, and are escaped there', async () => {
    await using server = await wild();
    const outcome = await cli(['jobs', '--qmp', server.address, '--json']);
    expect(documentOf(outcome)).toMatchObject([{ id: WILD, type: WILD, device: `${WILD}d`, status: WILD }]);
    expect(withoutNewlines(outcome.stdout)).not.toMatch(/\p{Cc}/u);
  });

  test('reach no terminal by an error', async () => {
    await using server = await fakeServer({
      onCommand: ({ id }, peer) =>
        peer.write(`${JSON.stringify({ error: { class: 'GenericError', desc: WILD }, id })}\n`),
    });
    const { status, stderr } = await cli(['jobs', '--qmp', server.address]);
    expect([status, stderr.split('\n').length]).toEqual([1, 2]);
    expect(withoutNewlines(stderr)).not.toMatch(/\p{Cc}|\p{Cf}/u);
  });
});

describe('Ctrl-C', () => {
  /** Interrupts the command once `reached` has been. */
  async function interrupted(options: FakeOptions, args: string[], reached: (peer: Peer) => Promise<unknown>) {
    let connected: (peer: Peer) => void = () => {};
    const connection = new Promise<Peer>((resolve) => (connected = resolve));
    await using server = await fakeServer({ ...options, onConnection: (peer) => connected(peer) });
    await using running = spawnCli([...args, '--qmp', server.address, '--json']);
    const peer = await connection;
    await reached(peer);
    running.kill('SIGINT');
    const outcome = await running.exit;
    const { error } = documentOf<Failure>(outcome);
    expect([outcome.status, outcome.signal, error.code]).toEqual([130, null, 'CANCELLED']);
    expect(error.message).toContain(server.address);
    expect(outcome.stderr).toBe(`thicken: CANCELLED: ${error.message}\n`);
    if (!peer.socket.closed) await once(peer.socket, 'close');
  }

  test.each(COMMANDS)('ends %s where QEMU does not answer', async (...args) => {
    await interrupted({}, args, (peer) => peer.received(1));
  });

  test('ends the wait for a busy monitor', async () => {
    await interrupted({ greeting: null }, ['jobs'], () => Promise.resolve());
  });

  test('ends the wait for a job to go', async () => {
    const job = { id: 'slow', type: 'stream', status: 'running', 'current-progress': 0, 'total-progress': 8 };
    const onCommand = ({ id, execute }: Command, peer: Peer) =>
      peer.reply(id, execute === 'query-jobs' ? [job] : execute === 'query-block-jobs' ? [] : {});
    const waits = async (peer: Peer) => {
      const commands = await peer.received(12);
      expect(commands[2]).toMatchObject({ execute: 'job-cancel', arguments: { id: 'slow' } });
    };
    await interrupted({ onCommand }, ['cancel'], waits);
  });
});

describe.runIf(here)('the library', () => {
  test('lists and steers', async () => {
    await using qemu = await daemonWith('stream0');
    await using client = await QmpClient.connect(qemu.qmp);
    expect(await listJobs(client)).toMatchObject([{ id: 'stream0', device: 'disk', total: STREAM_SIZE, speed: CRAWL }]);
    await steerJob(client, 'stream0', { speed: MiB });
    await steerJob(client, 'stream0', 'pause');
    expect(await listJobs(client)).toMatchObject([{ speed: MiB }]);
    await expect(steerJob(client, 'stream0', { speed: 0 })).rejects.toMatchObject({ code: 'RANGE' });
    const waiting = steerJob(client, 'stream0', 'cancel', { signal: AbortSignal.abort() });
    await expect(waiting).rejects.toMatchObject({ code: 'CANCELLED' });
    await waitFor('it to go', async () => (await client.execute('query-jobs')).length === 0);
  });
});
