import { existsSync, readFileSync } from 'node:fs';
import { GuestChannel } from './guest-channel.js';
import { parseDump, type Base } from './guest-content.js';
import { guestImage, type GuestImage } from './guest-image.js';
import { answersQmp, start, type Outcome, type Spawned } from './processes.js';
import { scratchPath } from './scratch.js';
import { waitFor } from './wait.js';

export interface GuestDisk {
  /** Of the virtio-blk device. */
  id: string;
  file: string;
  format?: string;
  /** The default is `node-ID`. With `driveOnly`, the name of the drive, by default `drive-ID`. */
  nodeName?: string;
  /** How QEMU opens the file. */
  driver?: 'file' | 'host_device';
  discard?: 'unmap' | 'ignore';
  cacheDirect?: boolean;
  /** Declared with -drive, as of old: QEMU makes up the names of the nodes. */
  driveOnly?: boolean;
  /** Added to the node, or to the options of the drive. */
  nodeOptions?: Record<string, unknown>;
  /** Added to the device, as `werror` is. */
  deviceOptions?: Record<string, string | number>;
}

export interface GuestOptions {
  disks: readonly GuestDisk[];
  /** MiB. */
  memory?: number;
  machine?: string;
  extraArgs?: readonly string[];
}

/** The `name=number` pairs of an answer. */
export type Report = Record<string, number>;

export interface Guest extends AsyncDisposable {
  pid: number;
  /** Two, since a monitor serves one client. */
  qmpSocket: string;
  spareQmp: string;
  /** Once its program has found the disks; gives their sizes in bytes by name, vda being the first. */
  waitReady(): Promise<Report>;
  /**
   * Gives what the guest answers after `ok`. Sizes are bytes and whole blocks of 4 KiB; requests are
   * O_DIRECT; all commands are for the disk of the last `use`, at first vda. Durations are those of
   * the guest's clock, which stands still while QEMU has it stopped.
   *
   * - `base SEED REGION LENGTH`: the disk began as a template (see Base), not as zeros
   * - `fill SEED [OFFSET LENGTH]`: writes all of it: bytes, us
   * - `verify [OFFSET LENGTH]`: reads all of it: blocks, errors, unknown, us; first (wrong offset)
   * - `churn SEED [THREADS]`: writes and verifies at random until told to `stop`; `status` and
   *   `stop` give running, writes, bytes, reads, errors, failed; p50, p99 and max of a write in
   *   microseconds; first
   * - `latency SECONDS [OFFSET LENGTH]`: random 4 KiB writes, one at a time: count, failed, p50,
   *   p99, max
   * - `flush`, `discard [OFFSET LENGTH]`, `dump` (see generations), `use vdb`, `poweroff`
   * - `sh LINE`: busybox's shell: its status, a space, and its output with `\n` for newlines
   */
  command(line: string): Promise<string>;
  /** The same for answers that are numbers. */
  ask(line: string): Promise<Report>;
  /** Tells it what the disk held at first; see makeTemplate. */
  base(base: Base): Promise<void>;
  /** The last write of each block, for expectedImage. */
  generations(): Promise<Uint32Array>;
  /** Waits until QEMU has ended. */
  powerOff(): Promise<Outcome>;
  /** What the guest's kernel and program have printed. */
  console(): string;
  kill(signal?: NodeJS.Signals): void;
  exit: Promise<Outcome>;
  dispose(): Promise<void>;
}

const patience = { timeout: 60_000 };

interface Paths {
  qmp: string;
  spareQmp: string;
  channel: string;
  console: string;
}

/**
 * Starts a real guest under emulation; it is killed when the test file ends. On return QEMU has
 * opened the disks and answers at its monitors; the guest boots for some seconds more.
 */
export async function startGuest(options: GuestOptions): Promise<Guest> {
  const paths: Paths = {
    qmp: scratchPath('qmp'),
    spareQmp: scratchPath('spare-qmp'),
    channel: scratchPath('channel'),
    console: scratchPath('console'),
  };
  const args = guestArguments(options, await guestImage(), paths);
  const qemu = start('qemu-system-x86_64', args);
  try {
    const channel = await waitFor('QEMU to open the disks', () => connect(qemu, paths), patience);
    return new RunningGuest(qemu, channel, paths);
  } catch (error) {
    await qemu.dispose();
    throw error;
  }
}

async function connect({ child, stderr }: Spawned, paths: Paths): Promise<GuestChannel | undefined> {
  if (child.exitCode !== null || child.signalCode !== null) throw new Error(`QEMU ended: ${stderr()}`);
  return (await answersQmp(paths.spareQmp)) ? GuestChannel.connect(paths.channel) : undefined;
}

class RunningGuest implements Guest {
  readonly pid: number;
  readonly qmpSocket: string;
  readonly spareQmp: string;
  readonly exit: Promise<Outcome>;
  readonly #qemu: Spawned;
  readonly #channel: GuestChannel;
  readonly #console: string;
  readonly #ready: Promise<string>;

  constructor(qemu: Spawned, channel: GuestChannel, paths: Paths) {
    this.pid = qemu.pid;
    this.qmpSocket = paths.qmp;
    this.spareQmp = paths.spareQmp;
    this.exit = qemu.exit;
    this.#qemu = qemu;
    this.#channel = channel;
    this.#console = paths.console;
    this.#ready = channel.line();
    this.#ready.catch(() => undefined);
    qemu.exit.then(
      ({ stderr }) => channel.fail(new Error(`the guest has ended: ${stderr}${this.console().slice(-2000)}`)),
      (error: Error) => channel.fail(error),
    );
  }

  async waitReady(): Promise<Report> {
    return parseReport((await this.#ready).replace(/^ready ?/, ''));
  }

  async command(line: string): Promise<string> {
    await this.#ready;
    const answer = await this.#channel.send(line);
    const ok = /^ok(?: |$)/.exec(answer);
    if (!ok) throw new Error(`the guest, on "${line}": ${answer}`);
    return answer.slice(ok[0].length);
  }

  async ask(line: string): Promise<Report> {
    return parseReport(await this.command(line));
  }

  async base({ seed, region, length }: Base): Promise<void> {
    await this.command(`base ${seed} ${region} ${length}`);
  }

  async generations(): Promise<Uint32Array> {
    return parseDump(await this.command('dump'));
  }

  async powerOff(): Promise<Outcome> {
    await this.command('poweroff');
    return this.exit;
  }

  console(): string {
    return existsSync(this.#console) ? readFileSync(this.#console, 'utf8') : '';
  }

  kill(signal?: NodeJS.Signals): void {
    this.#qemu.kill(signal);
  }

  dispose(): Promise<void> {
    return this.#qemu.dispose();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.dispose();
  }
}

function parseReport(text: string): Report {
  const pairs = text.split(' ').filter((pair) => pair !== '');
  return Object.fromEntries(
    pairs.map((pair) => {
      const match = /^(\w+)=(\d+)$/.exec(pair);
      if (!match) throw new Error(`not name=number: ${pair}`);
      return [match[1]!, Number(match[2])];
    }),
  );
}

function guestArguments(options: GuestOptions, image: GuestImage, paths: Paths): string[] {
  const { machine = 'q35', memory = 192, extraArgs = [] } = options;
  return [
    ...['-machine', `${machine},accel=tcg`, '-m', String(memory), '-smp', '1'],
    ...['-nodefaults', '-no-user-config', '-display', 'none', '-no-reboot'],
    ...['-kernel', image.kernel, '-initrd', image.initramfs],
    // The kernel counts ticks against the processor's clock: on a busy machine it found the timer broken.
    ...['-append', 'console=ttyS0 quiet panic=-1 reboot=t no_timer_check'],
    ...['-serial', `file:${paths.console}`],
    ...options.disks.flatMap(diskArguments),
    ...['-device', 'virtio-serial-pci', '-device', 'virtserialport,chardev=channel,name=thicken'],
    ...['-qmp', `unix:${paths.qmp},server=on,wait=off`],
    ...['-qmp', `unix:${paths.spareQmp},server=on,wait=off`],
    ...['-chardev', `socket,id=channel,path=${paths.channel},server=on,wait=off`],
    ...extraArgs,
  ];
}

function diskArguments(disk: GuestDisk): string[] {
  const { id, driveOnly = false, deviceOptions = {} } = disk;
  const name = disk.nodeName ?? `${driveOnly ? 'drive' : 'node'}-${id}`;
  const device = { driver: 'virtio-blk-pci', id, drive: name, ...deviceOptions };
  return [
    ...(driveOnly ? driveArguments(disk, name) : nodeArguments(disk, name)),
    ...['-device', JSON.stringify(device)],
  ];
}

function nodeArguments(disk: GuestDisk, name: string): string[] {
  const cache = { direct: disk.cacheDirect ?? false };
  const node = {
    driver: disk.format ?? 'raw',
    'node-name': name,
    cache,
    discard: disk.discard ?? 'ignore',
    file: { driver: disk.driver ?? 'file', filename: disk.file, cache },
    ...disk.nodeOptions,
  };
  return ['-blockdev', JSON.stringify(node)];
}

function driveArguments(disk: GuestDisk, name: string): string[] {
  const options = {
    if: 'none',
    id: name,
    file: disk.file.replaceAll(',', ',,'),
    format: disk.format ?? 'raw',
    cache: disk.cacheDirect ? 'none' : 'writeback',
    discard: disk.discard ?? 'ignore',
    ...disk.nodeOptions,
  };
  const pairs = Object.entries(options).map(([key, value]) => `${key}=${String(value)}`);
  return ['-drive', pairs.join(',')];
}
