/** What the tests of disks in use share: QEMUs that say what is left in them, templates, overlays. */
import { mkdirSync, readdirSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { afterEach, expect } from 'vitest';
import { QmpClient } from '../../lib/qmp/client.js';
import type { AllocationResult } from '../../lib/types.js';
import type { Guest, Report } from '../support/guest.js';
import { expectedImage, type Base } from '../support/guest-content.js';
import { qemuCompare, qemuMap, type QemuExtent } from '../support/judges.js';
import { answersQmp, mustRun, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { cliJson, expectContract, soak, type JsonOutcome } from '../storage/helpers.js';

export { cliJson, KiB, MiB, soak, type Refusal } from '../storage/helpers.js';

// What thicken makes in the folder for temporary files can then be told from anybody else's.
process.env.TMPDIR = scratchPath('tmp');
mkdirSync(process.env.TMPDIR);

afterEach(() => {
  const left = readdirSync(tmpdir()).filter((name) => name.startsWith('thicken-'));
  expect(left, 'folders left').toEqual([]);
});

export const withQemu = requires({ tools: ['qemu-img', 'qemu-io', 'qemu-system-x86_64'] });
export const withNbdkit = requires({ tools: ['qemu-img', 'qemu-io', 'qemu-system-x86_64', 'nbdkit'] });
export const withGuest = requires({ guest: true });

/** Runs a few commands at a monitor that thicken does not use at the moment. */
export async function atMonitor<T>(qmp: string, use: (client: QmpClient) => Promise<T>): Promise<T> {
  await using client = await QmpClient.connect(qmp);
  return await use(client);
}

const QEMU = 'qemu-system-x86_64';

const ours = (name: string) => name.startsWith('thicken');

/** Of what thicken adds to a QEMU nothing is there any more, and no NBD server runs. */
export async function expectNothingLeft(qmp: string): Promise<void> {
  await atMonitor(qmp, async (client) => {
    const exports = await client.execute('query-block-exports');
    const nodes = await client.execute('query-named-block-nodes', { flat: true });
    const jobs = await client.execute('query-jobs');
    expect(exports.map(({ id }) => id).filter(ours), 'exports left').toEqual([]);
    expect(nodes.map((node) => node['node-name'] ?? '').filter(ours), 'nodes left').toEqual([]);
    expect(jobs.map(({ id }) => id).filter(ours), 'jobs left').toEqual([]);
    // Succeeds only where no server runs.
    const path = scratchPath('nbd');
    await client.executeAny('nbd-server-start', { addr: { type: 'unix', data: { path } } });
    await client.executeAny('nbd-server-stop');
  });
}

export interface Machine extends AsyncDisposable {
  qmp: string;
  pid: number;
  /** Looks whether anything was left, and ends QEMU in peace: its tables are then on the disk. */
  quit(): Promise<void>;
}

/** A QEMU whose guest never runs. `args`: its disks; `passed`: a file that it gets as descriptor 9. */
export async function startMachine(args: readonly string[], passed?: string): Promise<Machine> {
  const qmp = scratchPath('qmp');
  const common = ['-machine', 'q35,accel=tcg', '-nodefaults', '-display', 'none', '-m', '64', '-S'];
  const command = [QEMU, ...common, '-qmp', `unix:${qmp},server=on,wait=off`, ...args];
  const launcher = passed === undefined ? [] : ['sh', '-c', 'exec 9<>"$0" && exec "$@"', passed];
  const [program, ...rest] = [...launcher, ...command];
  const qemu = start(program!, rest);
  await waitFor('QEMU to open its disks', () => {
    if (qemu.child.exitCode !== null) throw new Error(`QEMU ended: ${qemu.stderr()}`);
    return answersQmp(qmp);
  });
  const quit = async (): Promise<void> => {
    await expectNothingLeft(qmp);
    await atMonitor(qmp, (client) => client.executeAny('quit'));
    expect(await qemu.exit, qemu.stderr()).toMatchObject({ status: 0 });
  };
  return { qmp, pid: qemu.pid, quit, [Symbol.asyncDispose]: () => qemu.dispose() };
}

/** Arguments for a disk: node `NAME`, device `dev-NAME`. */
export function diskArgs(name: string, format: string, file: string, options: object = {}): string[] {
  const node = { driver: format, 'node-name': name, file: { driver: 'file', filename: file }, ...options };
  return ['-blockdev', JSON.stringify(node), '-device', `virtio-blk-pci,id=dev-${name},drive=${name}`];
}

/** A guest that ends, when nothing of thicken's is left in its QEMU. */
export async function shutDown(guest: Guest): Promise<void> {
  await expectNothingLeft(guest.qmpSocket);
  expect(await guest.powerOff(), guest.console()).toMatchObject({ status: 0 });
}

/** When the guest has ended, its qcow2 image is sound, and reads as it was written, over `base`. */
export async function expectWritten(guest: Guest, file: string, size: number, base: Base): Promise<void> {
  const generations = await guest.generations();
  await shutDown(guest);
  const expected = scratchPath('expected.raw');
  expectedImage(expected, size, base, generations);
  await expectContent(file, 'qcow2', expected);
  await expectChecked(file, 'qcow2');
}

/** Runs `thicken allocate` on a disk, which must succeed with a document as in the contract. */
export async function allocate(qmp: string, device: string, ...args: string[]): Promise<AllocationResult> {
  const outcome = await allocateAny<AllocationResult>(qmp, device, ...args);
  expect(outcome.status, outcome.stderr).toBe(0);
  expectContract(outcome.document);
  return outcome.document;
}

/** Without what the host has to hold ready: the plan is then about the image alone. */
export const MAPPED = ['--preallocation', 'metadata'];

/** The same whatever comes of it. */
export function allocateAny<T>(qmp: string, device: string, ...args: string[]): Promise<JsonOutcome<T>> {
  return cliJson<T>(['allocate', '--qmp', qmp, '--device', device, ...args]);
}

export interface OverlayOptions {
  format?: string;
  backingFormat?: string;
  /** As qemu-img create takes them. */
  options?: string;
  size?: number;
}

export async function overlayOf(
  backing: string | null,
  { format = 'qcow2', backingFormat = 'raw', options, size }: OverlayOptions = {},
): Promise<string> {
  const path = scratchPath(`overlay.${format}`);
  const below = backing === null ? [] : ['-b', backing, '-F', backingFormat];
  const more = options === undefined ? [] : ['-o', options];
  await mustRun('qemu-img', ['create', '-q', '-f', format, ...below, ...more, path, ...(size ? [String(size)] : [])]);
  return path;
}

/** What a guest reads from the image, in a file of its own. */
export async function copyOf(path: string, format: string): Promise<string> {
  const copy = scratchPath('copy.raw');
  await mustRun('qemu-img', ['convert', '-f', format, '-O', 'raw', path, copy]);
  return copy;
}

export async function expectContent(path: string, format: string, expected: string): Promise<void> {
  expect(await qemuCompare(path, expected, { formatA: format }), `${path} is not ${expected}`).toBe(true);
}

export async function expectChecked(path: string, format: string): Promise<void> {
  const report: unknown = JSON.parse(await mustRun('qemu-img', ['check', '-f', format, '--output=json', path]));
  expect(report).toMatchObject({ 'check-errors': 0 });
  expect(report).not.toHaveProperty('leaks');
  expect(report).not.toHaveProperty('corruptions');
}

/** The content is the image's own: also with the backing file out of its header. */
export async function expectAlone(path: string, format: string, expected: string): Promise<void> {
  await mustRun('qemu-img', ['rebase', '-u', '-f', format, '-b', '', path]);
  await expectContent(path, format, expected);
}

/** Bytes of the image that are its own, as ranges; neighbours are joined. */
export async function ownRanges(path: string, format: string): Promise<[number, number][]> {
  const extents = await qemuMap(path, format);
  return join(extents.filter(({ depth, present }) => present && depth === 0));
}

function join(extents: readonly QemuExtent[]): [number, number][] {
  const ranges: [number, number][] = [];
  for (const { start: offset, length } of extents) {
    const last = ranges.at(-1);
    if (last && last[0] + last[1] === offset) last[1] += length;
    else ranges.push([offset, length]);
  }
  return ranges;
}

export function shuffled<T>(values: readonly T[], next: () => number): T[] {
  const all = [...values];
  for (let i = all.length - 1; i > 0; i--) {
    const j = next() % (i + 1);
    [all[i], all[j]] = [all[j]!, all[i]!];
  }
  return all;
}

/** What a guest measured of its writes while something ran beside it, in microseconds. */
export interface Latencies extends Report {
  count: number;
  p50: number;
  p99: number;
  max: number;
}

/** Rule 9 of the design: no write of a guest's waits longer. */
const LONGEST_WRITE_US = 150_000;

/**
 * Has the guest write for `seconds` while `work` goes on, which must end first. Only the long run,
 * with the machine to itself, judges what was measured.
 */
export async function besideWrites(
  guest: Guest,
  what: string,
  seconds: number,
  work: () => Promise<unknown>,
  where = '',
): Promise<Latencies> {
  // What the machine alone does to them, for comparison.
  if (soak) print('nothing', (await guest.ask(`latency 5 ${where}`.trim())) as Latencies);
  let over = false;
  const writing = guest.ask(`latency ${seconds} ${where}`.trim()).finally(() => (over = true));
  writing.catch(() => undefined);
  const began = performance.now();
  await work();
  const took = ((performance.now() - began) / 1000).toFixed(1);
  expect(over, `${what} outlasted the guest's ${seconds} s of writing`).toBe(false);
  const latencies = (await writing) as Latencies;
  print(`${what} (${took} s)`, latencies);
  expect(latencies).toMatchObject({ failed: 0 });
  expect(latencies.count).toBeGreaterThan(0);
  if (soak) expect(latencies.max, `longest write beside ${what}`).toBeLessThan(LONGEST_WRITE_US);
  return latencies;
}

function print(what: string, { count, p50, p99, max }: Latencies): void {
  process.stderr.write(`beside ${what}: ${count} writes, p50 ${p50} µs, p99 ${p99} µs, longest ${max} µs\n`);
}
