/** Runs of the command line by those who lack CAP_SYS_ADMIN, and so fanotify’s permission events. */
import { chmodSync, chownSync, cpSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { repository, run, start, type Outcome, type Spawned } from './processes.js';
import { scratch, scratchPath } from './scratch.js';

const NOBODY = 65534;

export interface Power {
  name: string;
  /** What a command is put behind. */
  by: [string, ...string[]];
  /** By what the gate learns of opens (native/gate.h). */
  gate: 'notification' | 'inotify';
  nobody: boolean;
}

const NO_FANOTIFY = 'echo 0 > /proc/sys/user/max_fanotify_groups && exec "$0" "$@"';

export const POWERS: Power[] = [
  {
    name: 'root without CAP_SYS_ADMIN',
    by: ['setpriv', '--bounding-set', '-sys_admin', '--inh-caps', '-sys_admin'],
    gate: 'notification',
    nobody: false,
  },
  {
    name: 'nobody',
    by: ['setpriv', '--reuid', 'nobody', '--regid', 'nogroup', '--clear-groups'],
    gate: 'notification',
    nobody: true,
  },
  {
    name: 'root of a user namespace without fanotify',
    by: ['unshare', '--user', '--map-root-user', 'sh', '-c', NO_FANOTIFY],
    gate: 'inotify',
    nobody: false,
  },
];

export const POWER_TOOLS = ['setpriv', 'unshare', 'python3'];

export function runAs({ by: [command, ...args] }: Power, program: string, rest: readonly string[]): Promise<Outcome> {
  return run(command, [...args, program, ...rest]);
}

export function startAs({ by: [command, ...args] }: Power, program: string, rest: readonly string[]): Spawned {
  return start(command, [...args, program, ...rest]);
}

let installed: string | undefined;

/** The command line in a place that everybody may read, wherever the repository is. */
export function publicCli(): string {
  return (installed ??= installPublicly());
}

function installPublicly(): string {
  const folder = scratchPath('thicken');
  for (const name of ['package.json', 'dist', 'build/Release/thicken.node', ...runtimePackages()]) {
    copyPublicly(join(repository, name), join(folder, name));
  }
  return join(folder, 'dist/cli/main.js');
}

/** Copies it to where everybody may read it. */
export function copyPublicly(from: string, to = scratchPath('copy')): string {
  cpSync(from, to, { recursive: true });
  chmodSync(scratch(), 0o755);
  return to;
}

function runtimePackages(): string[] {
  const lock = JSON.parse(readFileSync(join(repository, 'package-lock.json'), 'utf8')) as Lock;
  return Object.keys(lock.packages).filter((name) => name !== '' && !lock.packages[name]!.dev);
}

interface Lock {
  packages: Record<string, { dev?: boolean }>;
}

/** Makes a file theirs. */
export function giveTo({ nobody }: Power, path: string): void {
  if (nobody) chownSync(path, NOBODY, NOBODY);
}
