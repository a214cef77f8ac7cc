/** Programs that go to the background once they are ready, and are ended by us. */
import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

/** Runs a command that goes to the background and writes its pid to `pidfile`. */
async function startDaemon(command, args, pidfile) {
  rmSync(pidfile, { force: true });
  execFileSync(command, args, { stdio: ['ignore', 'ignore', 'inherit'] });
  let pid = 0;
  // nbdkit writes it after its parent has ended.
  for (const deadline = Date.now() + 10_000; pid === 0; await sleep(10)) {
    if (Date.now() > deadline) throw new Error(`${command} wrote no ${pidfile}`);
    pid = existsSync(pidfile) ? Number(readFileSync(pidfile, 'utf8')) : 0;
  }
  // What throws on the way out would keep the rest from being cleaned up.
  const kill = () => isRunning(pid) && process.kill(pid, 'SIGKILL');
  // Before the file system is taken away, which was asked for first.
  process.prependOnceListener('exit', kill);
  return {
    pid,
    async stop() {
      process.off('exit', kill);
      // QEMU and nbdkit both end in order on SIGTERM: the image is flushed and closed.
      process.kill(pid, 'SIGTERM');
      while (isRunning(pid)) await sleep(10);
    },
  };
}

function isRunning(pid) {
  try {
    const status = readFileSync(`/proc/${pid}/stat`, 'utf8');
    // Nobody may reap what was put into the background.
    return !/\) [ZX] /.test(status);
  } catch {
    return false;
  }
}

/**
 * A QEMU whose guest never runs, with `node` as its only disk, `disk0`.
 * @param {string} folder for its sockets
 * @param {object} node
 */
export async function startQemu(folder, node) {
  const [qmp, pidfile] = [join(folder, 'qmp'), join(folder, 'qemu.pid')];
  const daemon = await startDaemon(
    'qemu-system-x86_64',
    [
      ...['-S', '-display', 'none', '-nodefaults', '-machine', 'q35,accel=tcg', '-m', '64'],
      ...['-blockdev', JSON.stringify(node), '-device', `virtio-blk-pci,drive=${node['node-name']},id=disk0`],
      ...['-qmp', `unix:${qmp},server=on,wait=off`, '-pidfile', pidfile, '-daemonize'],
    ],
    pidfile,
  );
  return { ...daemon, qmp };
}

/** A qemu-storage-daemon that serves `node`, whose name is `disk`, on the socket `nbd` of the folder. */
export async function startStorageDaemon(folder, node) {
  const [socket, pidfile] = [join(folder, 'nbd'), join(folder, 'daemon.pid')];
  rmSync(socket, { force: true });
  return startDaemon(
    'qemu-storage-daemon',
    [
      ...['--daemonize', '--pidfile', pidfile, '--blockdev', JSON.stringify(node)],
      ...['--nbd-server', `addr.type=unix,addr.path=${socket}`],
      ...['--export', `type=nbd,id=disk,node-name=${node['node-name']},name=disk,writable=on`],
    ],
    pidfile,
  );
}

/** nbdkit serving a file through a filter; `args` are the filter's. */
export async function startNbdkit(folder, file, filter, args) {
  const [socket, pidfile] = [join(folder, 'nbdkit'), join(folder, 'nbdkit.pid')];
  rmSync(socket, { force: true });
  const daemon = await startDaemon(
    'nbdkit',
    ['--readonly', '-U', socket, '-P', pidfile, `--filter=${filter}`, 'file', file, ...args],
    pidfile,
  );
  return { ...daemon, socket };
}
