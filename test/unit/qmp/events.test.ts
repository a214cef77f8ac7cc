import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../../lib/errors.js';
import { EventHub } from '../../../lib/qmp/events.js';
import type { QmpEvent } from '../../../lib/qmp/message.js';

const event = (name: string, n = 0): QmpEvent => ({ name, data: { n }, timestamp: null });
const lost = new ThickenError('QMP_LOST', 'lost');
const never = {
  timeout: () => new ThickenError('QMP_TIMEOUT', 'timeout'),
  cancelled: () => new ThickenError('CANCELLED', 'cancelled'),
  closed: () => new ThickenError('CLOSED', 'closed'),
};

describe('EventStream', () => {
  test('gives what matches, in order, whether it is awaited before or after', async () => {
    const hub = new EventHub();
    const stream = hub.stream(['A', 'B'], 10);
    const first = stream.next();
    for (const name of ['A', 'C', 'B', 'A']) hub.publish(event(name));
    expect((await first).value?.name).toBe('A');
    expect((await stream.next()).value?.name).toBe('B');
    expect((await stream.next()).value?.name).toBe('A');
  });

  test('drops the oldest when nobody takes them, and counts them', async () => {
    const hub = new EventHub();
    const stream = hub.stream('A', 3);
    for (let n = 0; n < 10; n++) hub.publish(event('A', n));
    expect(stream.overflowed).toBe(7);
    hub.end(null);
    const left = [];
    for await (const { data } of stream) left.push(data['n']);
    expect(left).toEqual([7, 8, 9]);
  });

  test('a lost connection is told after what had come before', async () => {
    const hub = new EventHub();
    const stream = hub.stream('A', 3);
    const waiting = hub.stream('B', 3).next();
    hub.publish(event('A'));
    hub.end(lost);
    expect((await stream.next()).value?.name).toBe('A');
    await expect(stream.next()).rejects.toBe(lost);
    await expect(waiting).rejects.toBe(lost);
    await expect(hub.stream('A', 3).next()).rejects.toBe(lost);
  });

  test('ends when the loop is left, and takes no more', async () => {
    const hub = new EventHub();
    const stream = hub.stream('A', 3);
    hub.publish(event('A'));
    hub.publish(event('A'));
    for await (const _ of stream) break;
    hub.publish(event('A'));
    expect(await stream.next()).toEqual({ done: true, value: undefined });
    expect(stream.overflowed).toBe(0);
  });

  test('disposing ends whoever waits, also after a loss', async () => {
    const hub = new EventHub();
    const stream = hub.stream('A', 3);
    const waiting = stream.next();
    await stream[Symbol.asyncDispose]();
    expect((await waiting).done).toBe(true);
    const after = hub.stream('A', 3);
    hub.end(lost);
    after.dispose();
    expect((await after.next()).done).toBe(true);
  });

  test('a filter that throws ends its own stream, and no other', async () => {
    const hub = new EventHub();
    const bad = hub.stream(() => {
      throw new TypeError('mine');
    }, 3);
    const worse = hub.stream(() => {
      throw 'words';
    }, 3);
    const good = hub.stream('A', 3);
    hub.publish(event('A'));
    await expect(bad.next()).rejects.toThrow('mine');
    await expect(worse.next()).rejects.toThrow('words');
    expect((await good.next()).value?.name).toBe('A');
  });
});

describe('waitFor', () => {
  test('gives the first that matches from then on', async () => {
    const hub = new EventHub();
    hub.publish(event('A', 1));
    const waiting = hub.waitFor(({ name }) => name === 'A', {}, never);
    hub.publish(event('B', 2));
    hub.publish(event('A', 3));
    hub.publish(event('A', 4));
    expect((await waiting).data).toEqual({ n: 3 });
  });

  test('rejects in time, when cancelled, when lost, when closed', async () => {
    const hub = new EventHub();
    await expect(hub.waitFor('A', { timeoutMs: 5 }, never)).rejects.toMatchObject({ code: 'QMP_TIMEOUT' });
    await expect(hub.waitFor('A', { signal: AbortSignal.abort() }, never)).rejects.toMatchObject({ code: 'CANCELLED' });
    const abort = new AbortController();
    const cancelled = hub.waitFor('A', { signal: abort.signal }, never);
    abort.abort();
    await expect(cancelled).rejects.toMatchObject({ code: 'CANCELLED' });
    const closed = hub.waitFor('A', {}, never);
    hub.end(null);
    await expect(closed).rejects.toMatchObject({ code: 'CLOSED' });
    const broken = new EventHub();
    const gone = broken.waitFor('A', {}, never);
    broken.end(lost);
    await expect(gone).rejects.toBe(lost);
  });
});
