/** A qemu-storage-daemon as a process: started under a guardian, and ended with all that it was. */
import { spawn, type ChildProcess } from 'node:child_process';
import { constants } from 'node:fs';
import { access } from 'node:fs/promises';
import type { Socket } from 'node:net';
import { delimiter, isAbsolute, join } from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { diskErrors } from './errors.js';

const MIB = 2 ** 20;
const PROGRAM = 'qemu-storage-daemon';
const MONITOR_FD = 3;
const GUARD_FD = 4;
/** A second monitor, for whoever finds the daemon left behind. */
export const MONITOR_SOCKET = 'qmp.sock';
export const NBD_SOCKET = 'nbd.sock';
/** What the daemon says last is what matters. */
const MOST_STDERR = 4096;
/** To write what it holds in memory, and close its images. */
const QUIT_MS = 10_000;
/** Between what shows that it ends, and its end. */
const MOMENT_MS = 2_000;
/** More than the guardian gives it between the asking and the killing. */
const KILL_MS = 10_000;

/**
 * The shell is the daemon's guardian: it makes the folder, reaps the daemon, and then removes the folder;
 * one that thicken made itself would stay where it is killed before there is a guardian. A child of the
 * shell waits for a line that never comes: when thicken goes (kill -9 too), its end of the socket is closed,
 * and the daemon is asked to end, after 5 s by force. No name or number is looked up: a process that
 * nobody has waited for keeps its id.
 */
const SCRIPT = `
umask 0077
folder=$1
shift
mkdir "$folder" || exit
umask 0177
"$@" ${GUARD_FD}<&- &
daemon=$!
exec ${MONITOR_FD}<&- >/dev/null 2>&1
trap '' HUP INT TERM
(
  read -r line <&${GUARD_FD}
  kill -s TERM "$daemon"
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25; do
    sleep 0.2
  done
  kill -s KILL "$daemon"
) &
watcher=$!
exec ${GUARD_FD}<&-
wait "$daemon"
status=$?
kill -s KILL "$watcher"
wait "$watcher"
rm -f "$folder/${MONITOR_SOCKET}" "$folder/${NBD_SOCKET}"
rmdir "$folder"
exit "$status"
`;

/**
 * QEMU takes a buffer for each range that it copies. By default glibc gives memory of that size back to
 * the kernel, to get it anew, page by page, for the next: 2 s of the daemon's time for each 4 GiB
 * (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD).
 */
const MEMORY = {
  MALLOC_MMAP_THRESHOLD_: String(32 * MIB),
  MALLOC_TRIM_THRESHOLD_: String(256 * MIB),
};

export class DaemonProcess {
  /** The monitor's connection; its greeting says that the daemon is ready. */
  readonly monitor: Socket;
  /** Resolves when the process has ended: how, for people. */
  readonly ended: Promise<string>;
  private readonly guard: Socket;
  private text = '';
  private over = false;

  private constructor(private readonly child: ChildProcess) {
    this.monitor = child.stdio[MONITOR_FD] as Socket;
    this.guard = child.stdio[GUARD_FD] as Socket;
    this.guard.on('error', () => undefined);
    child.stderr?.setEncoding('utf8').on('data', (text: string) => {
      this.text = (this.text + text).slice(-MOST_STDERR);
    });
    this.ended = new Promise((resolve) => {
      const end = (how: string) => {
        this.over = true;
        resolve(how);
      };
      child.once('error', (error) => end(error.message));
      // Not `exit`: what it said last comes after that.
      child.once('close', (status, signal) => end(howOf(status, signal)));
    });
  }

  /** Starts it with its sockets in `folder`, which comes and goes with it. Throws DAEMON_MISSING. */
  static async start(folder: string): Promise<DaemonProcess> {
    const program = await find(PROGRAM);
    if (program === null) throw diskErrors.noDaemon(PROGRAM);
    const args = ['-c', SCRIPT, 'sh', folder, program, ...argumentsOf(folder)];
    const child = spawn('/bin/sh', args, {
      cwd: '/',
      // A session of its own: Ctrl-C at the terminal is for thicken to deal with.
      detached: true,
      env: { ...MEMORY, ...process.env },
      stdio: ['ignore', 'ignore', 'pipe', 'pipe', 'pipe'],
    });
    return new DaemonProcess(child);
  }

  /** What it has printed last. */
  get said(): string {
    return this.text.replaceAll(`${PROGRAM}: `, '').trim();
  }

  /** How it has ended, or ends in a moment; null where it runs on. */
  async endedSoon(): Promise<string | null> {
    return Promise.race([this.ended, expiry(MOMENT_MS).then(() => null)]);
  }

  /** Ends a daemon that `quit` asks to end; one that does not is ended by its guardian. */
  async end(quit?: () => Promise<unknown>): Promise<void> {
    if (quit && !this.over) {
      await Promise.race([this.ended, quit().catch(() => undefined), expiry(QUIT_MS)]);
      await Promise.race([this.ended, expiry(QUIT_MS)]);
    }
    this.guard.destroy();
    // One that hangs in the kernel is left to its guardian.
    await Promise.race([this.ended, expiry(KILL_MS)]);
    this.child.stderr?.destroy();
    this.child.unref();
  }
}

function howOf(status: number | null, signal: string | null): string {
  if (signal !== null) return `by ${signal}`;
  // As the shell has it.
  if (status !== null && status > 128) return `by signal ${status - 128}`;
  return `with status ${status ?? 'unknown'}`;
}

function expiry(milliseconds: number): Promise<void> {
  return sleep(milliseconds, undefined, { ref: false });
}

/** A folder's name may hold commas, which QEMU's options want doubled. */
function argumentsOf(folder: string): string[] {
  const path = (name: string) => join(folder, name).replaceAll(',', ',,');
  return [
    ...['--nbd-server', `addr.type=unix,addr.path=${path(NBD_SOCKET)}`],
    ...['--chardev', `socket,id=own,fd=${MONITOR_FD}`, '--monitor', 'chardev=own'],
    ...['--chardev', `socket,id=spare,path=${path(MONITOR_SOCKET)},server=on,wait=off`],
    ...['--monitor', 'chardev=spare'],
  ];
}

/** By PATH, as execvp(3) does. */
async function find(program: string): Promise<string | null> {
  for (const folder of (process.env['PATH'] ?? '').split(delimiter).filter(isAbsolute)) {
    const path = join(folder, program);
    if (await access(path, constants.X_OK).then(() => true, () => false)) return path;
  }
  return null;
}
