import { readFile } from 'node:fs/promises';
import { Descriptor, DIRECT, EXCLUSIVE, READ_ONLY, READ_WRITE } from './descriptor.js';
import { ThickenError } from './errors.js';
import {
  deviceInUse,
  factsOf,
  probeConflicts,
  refuseUsers,
  takeImageLocks,
  workUndisturbed,
} from './exclusive.js';
import { native, SYNC_FILE, type OpenGate, type Work } from './native.js';
import { systemClock } from './throttle.js';
import { diskFolder, usersOfDevice, usersOfFile, type Users } from './users.js';

/** The gate does not see an open of another node of the same device: that is looked for so often. */
const LOOK_AGAIN_MS = 500;
/** A process has its descriptor a moment after its open was let go. */
const SETTLING_MS = 25;
/** Who opens the device in passing is gone by then. */
const PATIENCE_MS = 800;
const ATTEMPTS = 40;
const NEVER = new AbortController().signal;

/** What a loop device lies on. */
interface Lower {
  /** The loop device, as sysfs names it. */
  loop: string;
  device: number;
  inode: number;
  /** The number, where that is a block device; else 0. */
  blockDevice: number;
  /** null where its name is gone, or means something else by now. */
  descriptor: Descriptor | null;
}

/**
 * A block device that nobody else uses, proven, for as long as this is held: O_EXCL against mounts,
 * swap and device-mapper; QEMU's locks on the node; no foreign descriptor or mapping of the device,
 * its partitions or its disk (neither O_EXCL nor locks keep QEMU off, or show through another
 * node); and the same for the file or device that a loop device lies on. A gate stops the work when
 * somebody opens the node or that file, and then it is looked at again.
 */
export class DeviceHold implements AsyncDisposable {
  private proof: Promise<void> = Promise.resolve();
  private renewing = false;
  private provenAt = 0;

  private constructor(
    private readonly device: Descriptor,
    private readonly lowers: Lower[],
    private readonly gate: OpenGate,
    private readonly trusted: boolean,
  ) {}

  /** Throws IN_USE, or the errno's name of a failed open. */
  static async take(image: Descriptor, trusted: boolean): Promise<DeviceHold> {
    const device = await openExclusive(image);
    const lowers: Lower[] = [];
    const hold = new DeviceHold(device, lowers, new (native().OpenGate)(), trusted);
    try {
      if ((await takeImageLocks(device)).length > 0) {
        throw deviceInUse(image.path, (await hold.users(false)).by);
      }
      await findLowers(device, lowers);
      for (const file of [device, ...lowers.map(({ descriptor }) => descriptor)]) {
        await file?.useNow((fd) => hold.gate.watch(fd));
      }
      await hold.prove();
      return hold;
    } catch (error) {
      await hold[Symbol.asyncDispose]();
      throw error;
    }
  }

  run(
    ranges: Float64Array,
    work: (ranges: Float64Array, fd: number, gate: OpenGate) => Promise<Work>,
  ): Promise<Work> {
    return workUndisturbed(
      this.device.path,
      ranges,
      async (rest) => {
        if (systemClock.now() - this.provenAt > LOOK_AGAIN_MS) void this.renew();
        await this.proof;
        return this.device.use((fd) => work(rest, fd, this.gate));
      },
      () => this.renew(),
    );
  }

  sync(): Promise<void> {
    return this.device.use((fd) => native().syncFile(fd, SYNC_FILE));
  }

  private renew(): Promise<void> {
    if (!this.renewing) {
      this.renewing = true;
      this.proof = this.prove(systemClock.now() + PATIENCE_MS).finally(() => {
        this.renewing = false;
      });
      this.proof.catch(() => undefined);
    }
    return this.proof;
  }

  /**
   * With a time to be patient until, what has only just come is given that time to leave, and
   * readers don't count: udev and the like open every device for a moment.
   */
  private async prove(until?: number): Promise<void> {
    for (let attempt = 0; attempt < ATTEMPTS; attempt++) {
      if (attempt > 0 || until !== undefined) await systemClock.sleep(SETTLING_MS, NEVER);
      this.gate.reset();
      const users = await this.users(until !== undefined);
      const leaving = users.by.length > 0 && until !== undefined && systemClock.now() < until;
      if (leaving) continue;
      refuseUsers(this.device.path, users, this.trusted);
      if (this.gate.settle()) {
        this.provenAt = systemClock.now();
        return;
      }
    }
    throw deviceInUse(this.device.path, ['somebody who opens it over and over']);
  }

  /** Of the device, and of all that it lies on. */
  private async users(writersOnly: boolean): Promise<Users> {
    const { rdev } = await factsOf(this.device);
    const found = [await usersOfDevice(rdev, Descriptor.ownNumbers(), { writersOnly })];
    for (const lower of this.lowers) found.push(await usersOfLower(lower, writersOnly));
    return {
      by: found.flatMap(({ by }) => by),
      blind: found.some(({ blind }) => blind),
    };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.proof.catch(() => undefined);
    await this.gate.close();
    for (const { descriptor } of this.lowers) await descriptor?.close();
    await this.device.close();
  }
}

async function openExclusive(image: Descriptor): Promise<Descriptor> {
  try {
    return await image.reopen(READ_WRITE | EXCLUSIVE | DIRECT);
  } catch (error) {
    if (!(error instanceof ThickenError) || error.code !== 'EBUSY') throw error;
    throw deviceInUse(image.path, ['a mounted file system, swap, or another driver']);
  }
}

async function usersOfLower(lower: Lower, writersOnly: boolean): Promise<Users> {
  const { loop: exceptLoop, device: dev, inode: ino, blockDevice, descriptor } = lower;
  const users = blockDevice
    ? await usersOfDevice(blockDevice, Descriptor.ownNumbers(), { writersOnly, exceptLoop })
    : await usersOfFile({ dev, ino }, { writersOnly: true, exceptLoop });
  const locked = descriptor !== null && (await probeConflicts(descriptor)).length > 0;
  const by = locked ? [`whoever holds QEMU’s locks on ${descriptor.path}`] : [];
  return { by: [...users.by, ...by], blind: users.blind };
}

/** A loop device does not hold its file for itself: who writes to that, writes to the device. */
async function findLowers(device: Descriptor, lowers: Lower[]): Promise<void> {
  const loop = await device.use((fd) => native().loopFacts(fd));
  if (!loop) return;
  const { rdev } = await factsOf(device);
  const folder = await diskFolder(rdev);
  const uevent = await readFile(`${folder}/uevent`, 'utf8');
  const descriptor = await openLower(`${folder}/loop/backing_file`, loop);
  lowers.push({ loop: /DEVNAME=(.*)/.exec(uevent)?.[1] ?? '', ...loop, descriptor });
  if (loop.blockDevice && descriptor) await findLowers(descriptor, lowers);
}

async function openLower(
  sysfs: string,
  loop: { device: number; inode: number; blockDevice: number },
): Promise<Descriptor | null> {
  const path = (await readFile(sysfs, 'utf8')).replace(/\n$/, '');
  const descriptor = await Descriptor.open(path, READ_ONLY).catch(() => null);
  if (!descriptor) return null;
  const facts = await factsOf(descriptor);
  const same = facts.isBlockDevice()
    ? facts.rdev === loop.blockDevice
    : facts.dev === loop.device && facts.ino === loop.inode;
  if (same) return descriptor;
  await descriptor.close();
  return null;
}
