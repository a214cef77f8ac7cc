/** What the tests of faults share: a QEMU whose disks never run, its monitors, and what thicken may leave. */
import { mkdirSync, readdirSync } from 'node:fs';
import { expect } from 'vitest';
import { isObject } from '../../lib/qmp/message.js';
import { QmpClient } from '../../lib/qmp/client.js';
import type { Refusal } from '../storage/helpers.js';
import { hold } from '../support/cleanup.js';
import { makePattern, type Segment } from '../support/patterns.js';
import {
  answersQmp,
  mustRun,
  run,
  spawnCli,
  start,
  type Outcome,
  type Spawned,
} from '../support/processes.js';
import { qemuIo } from '../support/qemu-io.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import type { AllocationResult } from '../../lib/types.js';

export { soak } from '../storage/helpers.js';
export const KiB = 1024;
export const MiB = 1024 * KiB;
export const TOOLS = ['qemu-system-x86_64', 'qemu-img', 'qemu-io', 'nbdkit'];

export type RouteKind = 'populate' | 'stream';
export const ROUTES: RouteKind[] = ['populate', 'stream'];

/** Bytes of a template, unless told otherwise. */
export const SIZE = 24 * MiB;

/** Data with holes between, of odd sizes, so that zeros have to be populated too. */
export function templateSegments(size = SIZE): Segment[] {
  const group: Segment[] = [
    { kind: 'data', length: MiB + 4 * KiB },
    { kind: 'hole', length: 192 * KiB },
    { kind: 'data', length: 60 * KiB },
    { kind: 'hole', length: 256 * KiB },
  ];
  const groups = Math.floor(size / (1.5 * MiB));
  const all = Array.from({ length: groups }, () => group).flat();
  return [...all, { kind: 'hole', length: size - groups * 1.5 * MiB }];
}

export async function makeTemplate(size = SIZE): Promise<string> {
  const path = scratchPath('template.raw');
  await makePattern(path, templateSegments(size));
  return path;
}

/** What is between QEMU and the template: a file's name, or an address as qemu-img takes it. */
export interface Disk {
  overlay: string;
  /** All that a guest reads from it, as it was at the beginning. */
  expected: string;
}

/** An overlay with some content of its own. */
export async function makeDisk(backing: string, overlay = scratchPath('overlay.qcow2')): Promise<Disk> {
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', backing, overlay]);
  await qemuIo(overlay, 'qcow2', 'write -q -P 7 3M 100k', 'write -q -z 5M 128k', 'write -q -P 9 9000k 4k');
  const expected = scratchPath('expected.raw');
  await mustRun('qemu-img', ['convert', '-f', 'qcow2', '-O', 'raw', overlay, expected]);
  return { overlay, expected };
}

/** Sound, and every byte as it was; `alone`: without anything below. */
export async function expectIntact({ overlay, expected }: Disk, { alone = false } = {}): Promise<void> {
  await expectSound(overlay);
  if (alone) {
    const info = JSON.parse(await mustRun('qemu-img', ['info', '--output=json', '-f', 'qcow2', overlay]));
    expect(info['backing-filename']).toBeUndefined();
  }
  const { status, stdout, stderr } = await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', expected, overlay]);
  expect(status, stdout + stderr).toBe(0);
}

/** Once QEMU has ended in peace, nothing depends on what is below the disk, and it is intact. */
export async function expectPopulated(host: Host, disk: Disk, options?: { alone?: boolean }): Promise<void> {
  await host.quit();
  expect(await isPopulated(disk.overlay)).toBe(true);
  await expectIntact(disk, options);
}

/** Leaked clusters (status 3) are what a killed QEMU may leave. */
export async function expectSound(overlay: string): Promise<void> {
  const { status, stdout, stderr } = await run('qemu-img', ['check', '-f', 'qcow2', overlay]);
  expect([0, 3], stdout + stderr).toContain(status);
}

/** Whether nothing depends on what is below the image, by QEMU's own map. */
export async function isPopulated(overlay: string): Promise<boolean> {
  const text = await mustRun('qemu-img', ['map', '--output=json', '-f', 'qcow2', overlay]);
  return (JSON.parse(text) as { depth: number; present: boolean }[]).every(
    ({ depth, present }) => depth === 0 && present,
  );
}

export interface Host extends AsyncDisposable {
  qemu: Spawned;
  pid: number;
  /** A monitor serves one client: thicken's, a second thicken's, and the tests' own. */
  monitors: [string, string, string];
  /** Where a thicken that is started with `env` keeps its files. */
  temp: string;
  env: { TMPDIR: string };
  /** Runs a command by the tests' own monitor. */
  ask(command: string, args?: object): Promise<unknown>;
  /** Ends QEMU in peace: what it holds of its tables in memory is written. */
  quit(): Promise<void>;
}

export interface HostOptions {
  /** Overlays; the devices are disk0, disk1, … */
  disks: readonly (string | { file: string; node: object })[];
  /** What QEMU is started by, as setpriv. */
  by?: readonly string[];
  args?: readonly string[];
  temp?: string;
}

/** A QEMU with devices whose guest never runs. */
export async function startHost({ disks, by = [], args = [], temp }: HostOptions): Promise<Host> {
  const monitors: Host['monitors'] = [scratchPath('qmp'), scratchPath('qmp'), scratchPath('qmp')];
  const command = [...by, 'qemu-system-x86_64', ...machine(disks, monitors), ...args];
  const qemu = start(command[0]!, command.slice(1));
  await waitFor('QEMU', () => {
    if (qemu.child.exitCode !== null) throw new Error(`QEMU ended: ${qemu.stderr()}`);
    return answersQmp(monitors[2]);
  });
  const own = temp ?? scratchPath('temp');
  mkdirSync(own, { recursive: true });
  const ask = async (name: string, given?: object): Promise<unknown> => {
    await using client = await QmpClient.connect(monitors[2]);
    return await client.executeAny(name, given);
  };
  const quit = async () => {
    await ask('quit').catch(() => undefined);
    await qemu.exit;
  };
  return {
    qemu, pid: qemu.pid, monitors, temp: own, env: { TMPDIR: own }, ask, quit,
    [Symbol.asyncDispose]: () => qemu.dispose(),
  };
}

function machine(disks: HostOptions['disks'], monitors: readonly string[]): string[] {
  return [
    ...['-machine', 'q35,accel=tcg', '-nodefaults', '-display', 'none', '-m', '64', '-S'],
    ...['-device', 'virtio-scsi-pci,id=scsi'],
    ...monitors.flatMap((path) => ['-qmp', `unix:${path},server=on,wait=off`]),
    ...disks.flatMap((disk, index) => {
      const { file, node } = typeof disk === 'string' ? { file: disk, node: {} } : disk;
      const blockdev = {
        driver: 'qcow2', 'node-name': `node${index}`, file: { driver: 'file', filename: file }, ...node,
      };
      return [
        ...['-blockdev', JSON.stringify(blockdev)],
        ...['-device', `scsi-hd,drive=node${index},id=disk${index}`],
      ];
    }),
  ];
}

/** Names of thicken's among exports, nodes and jobs; the names of what lies in its folder. */
export async function leftovers({ ask, temp }: Host): Promise<string[]> {
  const queries = [['query-block-exports', 'id'], ['query-named-block-nodes', 'node-name'], ['query-jobs', 'id']] as const;
  const found: string[] = [];
  for (const [query, key] of queries) {
    const rows = (await ask(query)) as unknown[];
    found.push(...rows.map((row) => String(isObject(row) ? row[key] : row)));
  }
  return [...found.filter((name) => name.startsWith('thicken')), ...readdirSync(temp)];
}

/** Nothing of thicken's is left, its NBD server included: another can be started. */
export async function expectClean(host: Host): Promise<void> {
  expect(await leftovers(host)).toEqual([]);
  const path = scratchPath('nbd');
  await host.ask('nbd-server-start', { addr: { type: 'unix', data: { path } } });
  await host.ask('nbd-server-stop');
}

export function allocateArgs(monitor: string, device: string, ...more: string[]): string[] {
  return ['allocate', '--qmp', monitor, '--device', device, ...more];
}

export interface AllocateOptions {
  route?: RouteKind;
  /** Bytes a second, as the command line takes them. */
  speed?: string;
  monitor?: string;
  device?: string;
  more?: readonly string[];
}

/** Starts an allocation that tells its progress on stderr, and its outcome on stdout. */
export function startAllocate(host: Host, options: AllocateOptions = {}): Spawned {
  const { route = 'populate', speed, monitor = host.monitors[0], device = 'disk0', more = [] } = options;
  const pace = speed === undefined ? [] : ['--speed', speed];
  const how = route === 'stream' ? ['--route', 'stream', '--drop-backing'] : ['--route', 'populate'];
  const args = allocateArgs(monitor, device, '--json', '--progress', 'json', ...how, ...pace, ...more);
  return spawnCli(args, { env: host.env });
}

/** The same to its end, which has to be a good one. */
export async function mustAllocate(host: Host, options: AllocateOptions = {}): Promise<AllocationResult> {
  const { status, stdout, stderr } = await timely(startAllocate(host, options));
  expect(status, stderr).toBe(0);
  return JSON.parse(stdout) as AllocationResult;
}

/** Waits until something has been allocated and is far from done. */
export async function underway(spawned: Spawned): Promise<void> {
  await spawned.output('stderr', /"position":[1-9]/, { timeout: 60_000 });
}

/** What hangs is a failure: it is killed, and has a signal then. */
export async function timely(spawned: Spawned, ms = 100_000): Promise<Outcome> {
  const timer = setTimeout(() => spawned.kill('SIGKILL'), ms);
  try {
    return await spawned.exit;
  } finally {
    clearTimeout(timer);
  }
}

/** The run has failed with one of these codes, in one line, and says what was done. */
export async function expectFailure(spawned: Spawned, codes: readonly string[], status = 1): Promise<Refusal> {
  const outcome = await timely(spawned);
  expect(outcome.signal, 'it hung').toBe(null);
  const lines = outcome.stdout.trimEnd().split('\n');
  expect(lines, outcome.stderr).toHaveLength(1);
  const refusal = JSON.parse(lines[0]!) as Refusal;
  expect(codes, refusal.error?.message).toContain(refusal.error?.code);
  expect(refusal.error.message).not.toMatch(/\n|undefined|\[object|defect/);
  expect(outcome.status, outcome.stdout).toBe(status);
  const last = outcome.stderr.trimEnd().split('\n').at(-1)!;
  expect(JSON.parse(last)).toMatchObject({ error: { code: refusal.error.code } });
  return refusal;
}

/** Something of the test's own that must not outlive it. */
export function holdClosable(close: () => void): () => Promise<void> {
  return hold({ release: async () => close(), releaseSync: close });
}
