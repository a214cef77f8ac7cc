import { execFileSync } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, realpathSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { basename } from 'node:path';
import { hold } from './cleanup.js';
import { mustRun, run } from './processes.js';
import { waitFor } from './wait.js';

export interface LoopOptions {
  file: string;
  sectorSize?: 512 | 4096;
  /** Looks for a partition table; see writePartitionTable. */
  partitioned?: boolean;
  readOnly?: boolean;
  /** Bytes into the file where the device starts. */
  offset?: number;
}

export interface Loop extends AsyncDisposable {
  device: string;
  file: string;
  partitions: string[];
  dispose(): Promise<void>;
}

export async function attachLoop(options: LoopOptions): Promise<Loop> {
  const file = realpathSync(options.file);
  const device = await attach(file, options);
  const dispose = hold({
    release: () => detach(device, file),
    releaseSync: () => {
      if (backingFile(device) === file) execFileSync('losetup', ['--detach', device]);
    },
  });
  try {
    const partitions = options.partitioned ? await findPartitions(device) : [];
    return { device, file, partitions, dispose, [Symbol.asyncDispose]: dispose };
  } catch (error) {
    await dispose();
    throw error;
  }
}

async function attach(file: string, options: LoopOptions): Promise<string> {
  const args = ['--find', '--show', '--sector-size', String(options.sectorSize ?? 512)];
  if (options.partitioned) args.push('--partscan');
  if (options.readOnly) args.push('--read-only');
  if (options.offset) args.push('--offset', String(options.offset));
  // Another process can take the free device between losetup's finding it and its taking it.
  const outcome = await waitFor(`a loop device for ${file}`, async () => {
    const attempt = await run('losetup', [...args, file]);
    return /busy/i.test(attempt.stderr) ? undefined : attempt;
  });
  if (outcome.status !== 0) throw new Error(`losetup: ${outcome.stderr}`);
  return outcome.stdout.trim();
}

/** The name alone does not make it ours: once detached, the device may serve somebody else. */
export function backingFile(device: string): string | undefined {
  try {
    const path = readFileSync(`/sys/block/${basename(device)}/loop/backing_file`, 'utf8');
    return path.replace(/\n$/, '').replace(/ \(deleted\)$/, '');
  } catch {
    return undefined;
  }
}

async function detach(device: string, file: string): Promise<void> {
  if (backingFile(device) !== file) return;
  await mustRun('losetup', ['--detach', device]);
  // Detaching a device that is open somewhere only takes effect when it is closed.
  await waitFor(`${device} to be free of ${file}`, () => backingFile(device) !== file);
}

async function findPartitions(device: string): Promise<string[]> {
  // The kernel may have been built without the parser for this table; partx brings its own.
  await mustRun('partx', ['--update', device]);
  return waitFor(`partitions on ${device}`, () => {
    const nodes = partitionNodes(device);
    return nodes.length > 0 && nodes.every((node) => existsSync(node)) ? nodes : undefined;
  });
}

function partitionNodes(device: string): string[] {
  const name = basename(device);
  return readdirSync(`/sys/block/${name}`)
    .filter((entry) => entry.startsWith(`${name}p`))
    .sort()
    .map((entry) => `/dev/${entry}`);
}

/** Writes an MBR with up to four Linux partitions; offsets and lengths in bytes. */
export async function writePartitionTable(
  file: string,
  partitions: readonly { offset: number; length: number }[],
  sectorSize = 512,
): Promise<void> {
  const sector = Buffer.alloc(512);
  partitions.forEach(({ offset, length }, index) => {
    const entry = 446 + 16 * index;
    sector[entry + 4] = 0x83;
    sector.writeUInt32LE(offset / sectorSize, entry + 8);
    sector.writeUInt32LE(length / sectorSize, entry + 12);
  });
  sector.writeUInt16LE(0xaa55, 510);
  const handle = await open(file, 'r+');
  try {
    await handle.write(sector, 0, sector.length, 0);
    await handle.sync();
  } finally {
    await handle.close();
  }
}
