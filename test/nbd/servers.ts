import { existsSync } from 'node:fs';
import { mustRun, start, type Spawned } from '../support/processes.js';
import { scratch, scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';

export interface Server extends AsyncDisposable {
  socketPath: string;
  uri: string;
  process: Spawned;
}

/** A nbdkit with this plugin, its parameters and filters; `options` come before the plugin. */
export async function nbdkit(
  plugin: readonly string[],
  options: readonly string[] = [],
  socketPath = scratchPath('s'),
): Promise<Server> {
  const pidfile = scratchPath('pid');
  // Its plugin `eval` leaves a folder of scripts behind where it is killed.
  const env = { TMPDIR: scratch() };
  const process = start('nbdkit', ['-f', '-U', socketPath, '-P', pidfile, ...options, ...plugin], { env });
  return started(process, socketPath, pidfile, '');
}

/** The same of a file, for reading; `parameters`: those of its filters. */
export function serveFile(
  path: string,
  filters: readonly string[] = [],
  parameters: readonly string[] = [],
  socketPath = scratchPath('s'),
): Promise<Server> {
  return nbdkit(['file', path, ...parameters], ['-r', ...filters.map((name) => `--filter=${name}`)], socketPath);
}

/** A qemu-nbd, which tells of depths and serves until it is killed. */
export async function qemuNbd(file: string, format: string, options: readonly string[] = []): Promise<Server> {
  const socketPath = scratchPath('s');
  const pidfile = scratchPath('pid');
  const own = ['-f', format, '-k', socketPath, `--pid-file=${pidfile}`, '-t', '-e', '8', '-A'];
  return started(start('qemu-nbd', [...own, ...options, file]), socketPath, pidfile, '');
}

/** A storage daemon that exports the image as `disk`, with depths. */
export async function storageDaemon(file: string, format: string, blockdev: object = {}): Promise<Server> {
  const socketPath = scratchPath('s');
  const pidfile = scratchPath('pid');
  const node = { driver: format, 'node-name': 'disk', file: { driver: 'file', filename: file }, ...blockdev };
  const process = start('qemu-storage-daemon', [
    ...['--blockdev', JSON.stringify(node)],
    ...['--nbd-server', `addr.type=unix,addr.path=${socketPath},max-connections=8`],
    ...['--export', 'type=nbd,id=export,node-name=disk,name=disk,writable=on,allocation-depth=on'],
    ...['--pidfile', pidfile],
  ]);
  return started(process, socketPath, pidfile, 'disk');
}

async function started(process: Spawned, socketPath: string, pidfile: string, name: string): Promise<Server> {
  await waitFor(`the NBD server on ${socketPath}`, () => {
    if (process.child.exitCode !== null) throw new Error(`the server ended: ${process.stderr()}`);
    return existsSync(pidfile) && existsSync(socketPath);
  });
  const uri = `nbd+unix:///${name}?socket=${socketPath}`;
  return { socketPath, uri, process, [Symbol.asyncDispose]: () => process.dispose() };
}

export interface InfoExtent {
  offset: number;
  length: number;
  type: number;
}

/** The same context as another client tells it. */
export async function nbdinfoMap(uri: string, context: string): Promise<InfoExtent[]> {
  return JSON.parse(await mustRun('nbdinfo', [`--map=${context}`, '--json', uri])) as InfoExtent[];
}
