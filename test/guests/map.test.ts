/** What `thicken map` says of a disk in use is what `qemu-img map` says of it at rest. */
import { describe, expect, it } from 'vitest';
import type { MapEntry } from '../../lib/types.js';
import { makeTemplate } from '../support/guest-content.js';
import { qemuMap } from '../support/judges.js';
import { random } from '../support/patterns.js';
import { qemuIo } from '../support/qemu-io.js';
import { scratchPath } from '../support/scratch.js';
import {
  atMonitor,
  cliJson,
  diskArgs,
  KiB,
  MiB,
  overlayOf,
  soak,
  startMachine,
  withQemu,
} from './helpers.js';

const ROUNDS = Array.from({ length: soak ? 100 : 6 }, (_, i) => i + 1);
const COMMANDS = 24;

interface Facts {
  start: number;
  length: number;
  zero: boolean;
  data: boolean;
  own: boolean;
}

type Entry = Pick<MapEntry, 'start' | 'length' | 'zero' | 'data' | 'depth' | 'present'>;

/** What both tell, joined where it does not change. */
function facts(entries: readonly Entry[]): Facts[] {
  const joined: Facts[] = [];
  for (const { start, length, zero, data, depth, present } of entries) {
    const own = present && depth === 0;
    const last = joined.at(-1);
    if (last && last.zero === zero && last.data === data && last.own === own) last.length += length;
    else joined.push({ start, length, zero, data, own });
  }
  return joined;
}

/** Writes, zeros and discards anywhere, of any length. */
function commands(next: () => number, size: number): string[] {
  return Array.from({ length: COMMANDS }, () => {
    const sector = next() % (size / 512 - 1);
    const most = Math.min(size / 512 - sector, 1 << next() % 12);
    const place = `${sector * 512} ${(1 + (next() % most)) * 512}`;
    const kinds = [`write -P ${1 + (next() % 255)}`, 'write -z', 'write -z -u', 'discard'];
    return `${kinds[next() % kinds.length]} ${place}`;
  });
}

interface Shape {
  size: number;
  options: string;
  layers: number;
  template: number;
}

function shapeOf(next: () => number): Shape {
  const clusters = ['4k', '64k', '512k', '2M'][next() % 4]!;
  const extended = clusters !== '4k' && next() % 3 === 0 ? ',extended_l2=on' : '';
  const size = (4 + (next() % 12)) * MiB + (next() % 3) * 4 * KiB + (next() % 2) * 512;
  const shorter = next() % 2 === 0 ? Math.floor(size / 2 / 4096) * 4096 : 16 * MiB;
  return { size, options: `cluster_size=${clusters}${extended}`, layers: next() % 3, template: shorter };
}

async function randomChain(seed: number): Promise<{ file: string; size: number; next: () => number }> {
  const next = random(seed);
  const { size, options, layers, template } = shapeOf(next);
  let below: string | null = null;
  let backingFormat = 'raw';
  if (layers > 0) {
    below = scratchPath('template.raw');
    makeTemplate(below, { size: template, seed });
  }
  for (let layer = 1; layer < layers; layer++) {
    below = await overlayOf(below, { backingFormat, size: Math.max(MiB, Math.floor(size / 1024) * 512) });
    await qemuIo(below, 'qcow2', ...commands(next, MiB));
    backingFormat = 'qcow2';
  }
  const file = await overlayOf(below, { backingFormat, options, size });
  await qemuIo(file, 'qcow2', ...commands(next, size));
  return { file, size, next };
}

async function mapOf(qmp: string, ...args: string[]): Promise<MapEntry[]> {
  const { status, stderr, document } = await cliJson<MapEntry[]>(['map', '--qmp', qmp, '--device', 'disk', ...args]);
  expect(status, stderr).toBe(0);
  return document;
}

function expectWhole(entries: readonly MapEntry[], from: number, to: number): void {
  let at = from;
  for (const { start, length } of entries) {
    expect(start).toBe(at);
    expect(length).toBeGreaterThan(0);
    at += length;
  }
  expect(at).toBe(to);
}

describe.runIf(withQemu)('the map of a disk in use', () => {
  it.each(ROUNDS)('equals that of the image at rest (seed %i)', async (seed) => {
    const { file, size, next } = await randomChain(seed);
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file, { discard: 'unmap' }));
    // Changes that QEMU has not written to its tables yet count too.
    await atMonitor(machine.qmp, async (client) => {
      for (const line of commands(next, size).slice(0, 4)) {
        const command = `qemu-io -d /machine/peripheral/dev-disk/virtio-backend "${line}"`;
        const complaint = await client.executeAny('human-monitor-command', { 'command-line': command });
        expect(complaint).toBe('');
      }
    });
    const live = await mapOf(machine.qmp);
    expectWhole(live, 0, size);
    for (const entry of live) expect(entry.host).toBe('unknown');
    const [offset, length] = [Math.floor(size / 3), Math.floor(size / 3)];
    const part = await mapOf(machine.qmp, '--offset', String(offset), '--length', String(length));
    expectWhole(part, offset, offset + length);
    await machine.quit();
    expect(facts(live)).toEqual(facts(await qemuMap(file, 'qcow2')));
  });
});
