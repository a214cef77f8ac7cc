import { join } from 'node:path';
import { mustRun, repository, run } from '../support/processes.js';

export const soak = Boolean(process.env.THICKEN_SOAK);
export const KiB = 1024;
export const MiB = 1024 * KiB;
export const GiB = 1024 * MiB;

export type Level = 'metadata' | 'falloc' | 'full';

/** What native/qcow2/map.h calls them. */
export const UNALLOCATED = 0;
export const ZERO_PLAIN = 1;
export const ZERO_ALLOCATED = 2;
export const DATA = 3;
export const COMPRESSED = 4;

/** offset, length, state, host, flags */
export type Extent = [number, number, number, number, number];

export interface Answer {
  code: string;
  message: string;
  failure: string;
  mapped: number;
  reserved: boolean;
  leaks: number;
  excess: number;
  operations: number;
  states: number;
  leaking: number;
  written: number;
  count: number;
  peakKiB: number;
  extents: Extent[];
  needed: Record<'data' | 'tables' | 'refcounts' | 'reused' | 'freed' | 'reserve' | 'counted' | 'fileEnd', number>;
  bitmaps: number;
  luks: number;
  autoclear: number;
  writable: string;
}

/** Builds native/test/qcow2_tool.cc, and gives its path. Test files run side by side: one builds. */
export async function buildTool(kind: 'sanitized' | 'release'): Promise<string> {
  const folder = join(repository, 'build-asan', `qcow2-${kind}`);
  const sanitize = kind === 'sanitized' ? 'ON' : 'OFF';
  const configure = ['cmake', '-S', repository, '-B', folder, `-DTHICKEN_SANITIZE=${sanitize}`];
  const build = ['cmake', '--build', folder, '--target', 'qcow2_tool', '--parallel', '2'];
  await mustRun('mkdir', ['-p', folder]);
  for (const command of [configure, build]) await mustRun('flock', [folder, ...command]);
  return join(folder, 'qcow2_tool');
}

type Value = string | number | undefined;

/** Runs the tool; its answer, whatever it is. What the sanitizers find is an error. */
export async function ask(
  tool: string,
  command: 'info' | 'map' | 'survey' | 'allocate' | 'crash',
  file: string,
  options: Record<string, Value> = {},
): Promise<Answer> {
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  const args = [command, file, ...given.map(([name, value]) => `${name}=${value}`)];
  const { stdout, stderr, status, signal } = await run(tool, args, { timeout: soak ? 1_800_000 : 600_000 });
  if (stderr !== '' || (status !== 0 && status !== 1)) {
    throw new Error(`${tool} ${args.join(' ')}: ${signal ?? status}: ${stderr}`);
  }
  return JSON.parse(stdout) as Answer;
}

/** The same, and it must have done what it was asked to. */
export async function must(...args: Parameters<typeof ask>): Promise<Answer> {
  const answer = await ask(...args);
  if (answer.code === 'OK' || answer.failure === '') return answer;
  throw new Error(`${args[1]} ${args[2]}: ${answer.code ?? ''} ${answer.message ?? answer.failure}`);
}

export async function qemuImg(...args: string[]): Promise<string> {
  return mustRun('qemu-img', args);
}

export interface CheckReport {
  leaks: number;
  corruptions: number;
  'check-errors': number;
}

export async function check(file: string): Promise<CheckReport> {
  const { stdout, stderr } = await run('qemu-img', ['check', '--output=json', file]);
  if (!stdout.startsWith('{')) throw new Error(`qemu-img check ${file}: ${stderr}`);
  const { leaks = 0, corruptions = 0, 'check-errors': errors = 0 } = JSON.parse(stdout) as Partial<CheckReport>;
  return { leaks, corruptions, 'check-errors': errors };
}

export const CLEAN: CheckReport = { leaks: 0, corruptions: 0, 'check-errors': 0 };

export async function qemuIo(file: string, commands: string[], options: string[] = []): Promise<void> {
  if (commands.length === 0) return;
  const output = await mustRun('qemu-io', [...options, ...commands.flatMap((command) => ['-c', command]), file]);
  if (/failed|error/i.test(output)) throw new Error(`qemu-io ${file}: ${output}`);
}

/** Names of the internal snapshots. */
export async function snapshotsOf(file: string): Promise<string[]> {
  const info = JSON.parse(await qemuImg('info', '--output=json', file)) as { snapshots?: { name: string }[] };
  return (info.snapshots ?? []).map(({ name }) => name);
}

/** Content of the active image and of each snapshot, as raw files beside it. */
export async function contentOf(file: string, label: string): Promise<string[]> {
  const active = `${file}.${label}.raw`;
  await qemuImg('convert', '-O', 'raw', file, active);
  const files = [active];
  for (const name of await snapshotsOf(file)) {
    files.push(`${file}.${label}.${name}.raw`);
    await qemuImg('convert', '-O', 'raw', '-l', `snapshot.name=${name}`, file, files.at(-1)!);
  }
  return files;
}

export async function sameContent(before: readonly string[], after: readonly string[]): Promise<void> {
  if (before.length !== after.length) throw new Error('the snapshots are not the same');
  for (const [i, file] of before.entries()) await mustRun('cmp', [file, after[i]!]);
}
