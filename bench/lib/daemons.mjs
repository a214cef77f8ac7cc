/** Programs that go to the background once they are ready, and are ended by us. */
import { execFileSync } from 'node:child_process';
import { readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';

/** Runs a command that writes its pid to `pidfile`, and returns when it serves. */
function startDaemon(command, args, pidfile) {
  execFileSync(command, args, { stdio: ['ignore', 'ignore', 'inherit'] });
  const pid = Number(readFileSync(pidfile, 'utf8'));
  const kill = () => process.kill(pid, 'SIGKILL');
  // Before the file system is taken away, which was asked for first.
  process.prependOnceListener('exit', kill);
  return {
    pid,
    async stop() {
      process.off('exit', kill);
      // QEMU and nbdkit both end in order on SIGTERM: the image is flushed and closed.
      process.kill(pid, 'SIGTERM');
      while (isRunning(pid)) await sleep(10);
      rmSync(pidfile, { force: true });
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
export function startQemu(folder, node) {
  const [qmp, pidfile] = [join(folder, 'qmp'), join(folder, 'qemu.pid')];
  const daemon = startDaemon(
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

/** nbdkit serving a file through a filter; `args` are the filter's. */
export function startNbdkit(folder, file, filter, args) {
  const [socket, pidfile] = [join(folder, 'nbdkit'), join(folder, 'nbdkit.pid')];
  rmSync(socket, { force: true });
  const daemon = startDaemon(
    'nbdkit',
    ['--readonly', '-U', socket, '-P', pidfile, `--filter=${filter}`, 'file', file, ...args],
    pidfile,
  );
  return { ...daemon, socket };
}
