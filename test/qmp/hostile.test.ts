/** Whatever a peer sends: every promise settles, nothing crashes, and errors are ThickenErrors. */
import { setTimeout as sleep } from 'node:timers/promises';
import fc from 'fast-check';
import { expect, test } from 'vitest';
import { startStream } from '../../lib/qmp/block-jobs.js';
import { QmpClient } from '../../lib/qmp/client.js';
import { listJobs, steer } from '../../lib/qmp/job-control.js';
import { ThickenError } from '../../lib/errors.js';
import { fakeServer, GREETING, type Command, type Peer } from './fake-server.js';

type Move =
  | { kind: 'bytes'; bytes: Uint8Array }
  | { kind: 'text'; text: string }
  | { kind: 'reply'; which: number; value: unknown }
  | { kind: 'error'; which: number }
  | { kind: 'cut' }
  | { kind: 'end' };

const text = fc.oneof(
  fc.json().map((json) => `${json}\n`),
  fc.constantFrom('{', '}', '"', '{"return": ', '[[[[', '\n', 'hello\n', GREETING, `{"a":${'['.repeat(1500)}`),
  fc.integer({ min: -1, max: 2000 }).map((id) => `{"return": {}, "id": ${id}}\n`),
  fc.constantFrom(
    '{"return": {}, "error": {"class": "a", "desc": "b"}, "id": 1}',
    '{"error": {"class": "GenericError", "desc": "words"}}',
    '{"error": {"class": 1, "desc": 2}, "id": 2}',
    '{"event": "STOP", "return": {}}',
    '{"event": "BLOCK_JOB_COMPLETED", "data": {"device": "job", "error": 7}}',
    '{"event": "JOB_STATUS_CHANGE", "data": {"id": "job", "status": "concluded"}}',
    '{"event": "STOP", "data": 5}',
    '{"return": {}, "id": "1"}',
  ),
);
const move: fc.Arbitrary<Move> = fc.oneof(
  { weight: 3, arbitrary: fc.record({ kind: fc.constant('text' as const), text }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('bytes' as const), bytes: fc.uint8Array({ maxLength: 40 }) }) },
  {
    weight: 6,
    arbitrary: fc.record({
      kind: fc.constant('reply' as const),
      which: fc.nat(),
      value: fc.oneof(fc.jsonValue(), fc.constant([{ id: 'job', device: 'job', status: 'running' }])),
    }),
  },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('error' as const), which: fc.nat() }) },
  { weight: 1, arbitrary: fc.constant({ kind: 'cut' } as const) },
  { weight: 1, arbitrary: fc.constant({ kind: 'end' } as const) },
);

function play(next: Move, peer: Peer, open: Command[]): void {
  if (next.kind === 'bytes') peer.write(next.bytes);
  else if (next.kind === 'text') peer.write(next.text);
  else if (next.kind === 'cut') peer.socket.destroy();
  else if (next.kind === 'end') peer.socket.end();
  else {
    const [command] = open.splice(next.which % Math.max(1, open.length), 1);
    if (!command) return;
    if (next.kind === 'reply') peer.reply(command.id, next.value);
    else peer.write(`{"error": {"class": "GenericError", "desc": "no"}, "id": ${command.id}}`);
  }
}

/** Many things asked for at once; what became of each. */
async function askForAll(client: QmpClient): Promise<PromiseSettledResult<unknown>[]> {
  const signal = AbortSignal.timeout(30);
  const stream = client.events(() => true, { limit: 4 });
  const watch = async (): Promise<unknown> => {
    await using job = await startStream(client, { device: 'disk', jobId: 'job' }, { pollMs: 1, signal });
    return await job.outcome;
  };
  const asked = [
    client.execute('query-name'),
    client.execute('query-block', {}, { signal }),
    client.execute('query-status', {}, { oob: true }),
    client.supports('block-stream'),
    client.waitFor('STOP', { timeoutMs: 60 }),
    listJobs(client, { sampleMs: 1 }),
    steer(client, 'job', 'cancel'),
    steer(client, 'job', { speed: 5 }),
    watch(),
  ];
  const settled = await Promise.allSettled(asked);
  stream.dispose();
  return settled;
}

async function meet(moves: Move[]): Promise<PromiseSettledResult<unknown>[]> {
  const left = [...moves];
  const open: Command[] = [];
  await using server = await fakeServer({
    onCommand: (command, peer) => {
      open.push(command);
      const next = left.shift();
      if (next) play(next, peer, open);
    },
  });
  const client = await QmpClient.connect(server.address, { commandTimeoutMs: 60 });
  // What the commands did not bring on comes by itself.
  const timer = setInterval(() => {
    const next = left.shift();
    if (next) play(next, server.peers[0]!, open);
  }, 2);
  // A hang must name the moves that led to it, which the test's own time-out would not.
  const hang = new AbortController();
  const hung = sleep(60_000, undefined, { signal: hang.signal }).then(() => {
    throw new Error('something does not settle');
  });
  hung.catch(() => undefined);
  try {
    return await Promise.race([askForAll(client), hung]);
  } finally {
    hang.abort();
    clearInterval(timer);
    await client.close();
    await client.onLost;
  }
}

const CODES = ['QMP_LOST', 'QMP_PROTOCOL', 'QMP_COMMAND', 'QMP_TIMEOUT', 'CANCELLED', 'UNKNOWN_JOB', 'JOB_GONE', 'CLOSED'];

test('every promise settles, as a value or as an error with a code', async () => {
  const seen = new Set<string>();
  await fc.assert(
    fc.asyncProperty(fc.array(move, { maxLength: 30, size: 'max' }), async (moves) => {
      for (const result of await meet(moves)) {
        if (result.status === 'fulfilled') continue;
        const error: unknown = result.reason;
        expect(error).toBeInstanceOf(ThickenError);
        const { code } = error as ThickenError;
        expect(CODES).toContain(code);
        seen.add(code);
      }
    }),
    { numRuns: Number(process.env['THICKEN_SOAK'] ? 500 : 60) },
  );
  // The moves are such that this is a test at all.
  expect([...seen]).toEqual(expect.arrayContaining(['QMP_PROTOCOL', 'QMP_TIMEOUT', 'CANCELLED']));
}, 600_000);

test('connecting settles whatever comes instead of a greeting', async () => {
  await fc.assert(
    fc.asyncProperty(fc.array(text, { maxLength: 6 }), fc.boolean(), async (texts, ends) => {
      await using server = await fakeServer({
        greeting: null,
        onConnection: ({ write, socket }) => {
          texts.forEach(write);
          if (ends) socket.end();
        },
      });
      try {
        await using client = await QmpClient.connect(server.address, { timeoutMs: 30 });
        expect(client.name).toBe(server.address);
      } catch (error) {
        expect(error).toBeInstanceOf(ThickenError);
        expect(['QMP_LOST', 'QMP_PROTOCOL', 'QMP_TIMEOUT', 'MONITOR_BUSY', 'QMP_COMMAND']).toContain((error as ThickenError).code);
      }
    }),
    { numRuns: 100 },
  );
}, 600_000);
