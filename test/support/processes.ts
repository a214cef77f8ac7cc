import { spawn, type ChildProcess } from 'node:child_process';
import { existsSync, readFileSync } from 'node:fs';
import { createConnection } from 'node:net';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { hold } from './cleanup.js';
import { scratchPath } from './scratch.js';
import { waitFor, type WaitOptions } from './wait.js';

export const repository = fileURLToPath(new URL('../../', import.meta.url)).replace(/\/$/, '');
export const cliMain = join(repository, 'dist/cli/main.js');

export interface Outcome {
  status: number | null;
  signal: NodeJS.Signals | null;
  stdout: string;
  stderr: string;
}

export interface RunOptions {
  cwd?: string;
  /** Added to the environment of the tests. */
  env?: NodeJS.ProcessEnv;
  input?: string;
  /** Milliseconds, after which the process is killed: a test must fail, not hang. */
  timeout?: number;
}

export interface Spawned extends AsyncDisposable {
  child: ChildProcess;
  pid: number;
  /** What it has printed so far. */
  stdout(): string;
  stderr(): string;
  /** The match, once the output so far matches; fails if the process ends first. */
  output(stream: 'stdout' | 'stderr', pattern: RegExp, options?: WaitOptions): Promise<RegExpExecArray>;
  kill(signal?: NodeJS.Signals): void;
  exit: Promise<Outcome>;
  dispose(): Promise<void>;
}

/** Starts a process that is killed, and only it, when the test file ends. */
export function start(command: string, args: readonly string[], options: RunOptions = {}): Spawned {
  const child = spawn(command, args, {
    cwd: options.cwd,
    env: { ...process.env, ...options.env },
    stdio: [options.input === undefined ? 'ignore' : 'pipe', 'pipe', 'pipe'],
  });
  const text = { stdout: '', stderr: '' };
  for (const name of ['stdout', 'stderr'] as const) {
    child[name]?.setEncoding('utf8').on('data', (chunk: string) => (text[name] += chunk));
  }
  // A program may end without reading its input; the broken pipe is then no fault of the test.
  child.stdin?.on('error', () => undefined).end(options.input);
  const exit = outcomeOf(child, text);
  exit.catch(() => undefined);
  const kill = (signal: NodeJS.Signals = 'SIGTERM'): void => void child.kill(signal);
  const dispose = hold({
    release: async () => {
      kill('SIGKILL');
      await exit.catch(() => undefined);
    },
    releaseSync: () => kill('SIGKILL'),
  });
  void exit.then(dispose, dispose);
  return {
    child,
    pid: child.pid ?? -1,
    stdout: () => text.stdout,
    stderr: () => text.stderr,
    output: (stream, pattern, waiting) =>
      waitFor(`${pattern} on ${stream} of ${command}`, () => match(child, text, stream, pattern), waiting),
    kill,
    exit,
    dispose,
    [Symbol.asyncDispose]: dispose,
  };
}

interface Text {
  stdout: string;
  stderr: string;
}

function outcomeOf(child: ChildProcess, text: Text): Promise<Outcome> {
  return new Promise((resolve, reject) => {
    child.once('error', reject);
    child.once('close', (status, signal) => resolve({ status, signal, ...text }));
  });
}

function match(
  child: ChildProcess,
  text: Text,
  stream: keyof Text,
  pattern: RegExp,
): RegExpExecArray | undefined {
  // The state is read first: what a process prints last must not be taken for missing.
  const over = ended(child);
  const found = pattern.exec(text[stream]);
  if (found) return found;
  if (over) throw new Error(`ended before ${pattern} was printed: ${text.stdout}${text.stderr}`);
  return undefined;
}

function ended(child: ChildProcess): boolean {
  const exited = child.exitCode !== null || child.signalCode !== null;
  return exited && Boolean(child.stdout?.readableEnded) && Boolean(child.stderr?.readableEnded);
}

/** Runs a process to its end; only a command that can't be started is an error. */
export async function run(
  command: string,
  args: readonly string[],
  options: RunOptions = {},
): Promise<Outcome> {
  const spawned = start(command, args, options);
  const timer = setTimeout(() => spawned.kill('SIGKILL'), options.timeout ?? 600_000);
  try {
    return await spawned.exit;
  } finally {
    clearTimeout(timer);
  }
}

/** Runs a process that has to succeed, and gives its stdout. */
export async function mustRun(
  command: string,
  args: readonly string[],
  options: RunOptions = {},
): Promise<string> {
  const { status, signal, stdout, stderr } = await run(command, args, options);
  if (status === 0) return stdout;
  throw new Error(`${command} ${args.join(' ')}: ${signal ?? `status ${status}`}: ${stderr || stdout}`);
}

export function cli(args: readonly string[], options: RunOptions = {}): Promise<Outcome> {
  return run(process.execPath, [cliMain, ...args], options);
}

export function spawnCli(args: readonly string[], options: RunOptions = {}): Spawned {
  return start(process.execPath, [cliMain, ...args], options);
}

export interface QemuOptions {
  file: string;
  format?: string;
  device?: 'file' | 'host_device';
  /** A guest that never runs (its disk is a virtio-blk device), or a storage daemon's NBD export. */
  kind?: 'guest' | 'daemon';
}

export interface Qemu extends AsyncDisposable {
  pid: number;
  /** Path of the QMP socket. */
  qmp: string;
  /** URI of the writable export; a guest has none. */
  nbd: string | null;
  dispose(): Promise<void>;
}

/** Starts a QEMU that holds write permission on the file; the node is named `disk`. */
export async function startQemu(options: QemuOptions): Promise<Qemu> {
  const kind = options.kind ?? 'daemon';
  const qmp = scratchPath('qmp');
  const pidfile = scratchPath('pid');
  const nbd = scratchPath('nbd');
  const common = [...nodeArguments(options), '--pidfile', pidfile];
  const spawned =
    kind === 'guest'
      ? start('qemu-system-x86_64', [...common, ...guestArguments(qmp)])
      : start('qemu-storage-daemon', [...common, ...daemonArguments(qmp, nbd)]);
  try {
    await waitFor(`QEMU on ${options.file}`, async () => {
      if (ended(spawned.child)) throw new Error(`QEMU ended: ${spawned.stderr()}`);
      return existsSync(pidfile) && readFileSync(pidfile, 'utf8') !== '' && (await answersQmp(qmp));
    });
  } catch (error) {
    await spawned.dispose();
    throw error;
  }
  return {
    pid: spawned.pid,
    qmp,
    nbd: kind === 'guest' ? null : `nbd+unix:///disk?socket=${nbd}`,
    dispose: spawned.dispose,
    [Symbol.asyncDispose]: spawned.dispose,
  };
}

function nodeArguments({ file, format = 'raw', device = 'file' }: QemuOptions): string[] {
  const node = { driver: format, 'node-name': 'disk', file: { driver: device, filename: file } };
  return ['--blockdev', JSON.stringify(node)];
}

function guestArguments(qmp: string): string[] {
  return [
    ...['-machine', 'q35,accel=tcg', '-nodefaults', '-display', 'none', '-m', '64', '-S'],
    ...['-device', 'virtio-blk-pci,drive=disk,id=disk0'],
    ...['-qmp', `unix:${qmp},server=on,wait=off`],
  ];
}

function daemonArguments(qmp: string, nbd: string): string[] {
  return [
    ...['--chardev', `socket,id=qmp,path=${qmp},server=on,wait=off`, '--monitor', 'chardev=qmp'],
    ...['--nbd-server', `addr.type=unix,addr.path=${nbd}`],
    ...['--export', 'type=nbd,id=export,node-name=disk,name=disk,writable=on'],
  ];
}

/**
 * Commands run in the main loop, so an answer means that all that the command line asks for is in
 * place; the greeting comes from another thread and may come before the disk is opened.
 */
export function answersQmp(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const connection = createConnection(socket, () => connection.write('{"execute":"qmp_capabilities"}\n'));
    let text = '';
    connection.setEncoding('utf8').on('data', (chunk: string) => {
      text += chunk;
      if (!text.includes('"return"')) return;
      resolve(true);
      connection.destroy();
    });
    connection.setTimeout(5_000, () => connection.destroy());
    connection.once('error', () => resolve(false));
    connection.once('close', () => resolve(false));
  });
}
