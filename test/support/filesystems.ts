import { execFileSync } from 'node:child_process';
import { mkdirSync, rmdirSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { hold } from './cleanup.js';
import { attachLoop, type Loop } from './loop.js';
import { mustRun, run } from './processes.js';
import { scratchPath } from './scratch.js';
import { waitFor } from './wait.js';

export type FilesystemType = 'ext4' | 'xfs' | 'btrfs' | 'ext3-format' | 'tmpfs';

export interface FilesystemOptions {
  type: FilesystemType;
  /** Bytes. xfs wants 300 MiB, btrfs 109 MiB; the backing file is sparse. */
  size: number;
  /** Of the loop device below. */
  sectorSize?: 512 | 4096;
  mkfsArgs?: string[];
  mountOptions?: string[];
}

export interface Filesystem extends AsyncDisposable {
  path: string;
  type: FilesystemType;
  /** The loop device and its backing file; null on tmpfs. */
  device: string | null;
  image: string | null;
  dispose(): Promise<void>;
}

const mkfs: Record<Exclude<FilesystemType, 'tmpfs'>, [string, ...string[]]> = {
  ext4: ['mkfs.ext4', '-q', '-F'],
  xfs: ['mkfs.xfs', '-q', '-f', '-m', 'reflink=1'],
  btrfs: ['mkfs.btrfs', '-q', '-f'],
  // Block-mapped files: fallocate(2) answers EOPNOTSUPP, FIEMAP works.
  'ext3-format': ['mkfs.ext4', '-q', '-F', '-O', '^extent,^64bit,^metadata_csum,^flex_bg,^huge_file'],
};

const kernelNames: Record<FilesystemType | 'overlay', string> = {
  ext4: 'ext4',
  xfs: 'xfs',
  btrfs: 'btrfs',
  'ext3-format': 'ext4',
  tmpfs: 'tmpfs',
  overlay: 'overlay',
};

export async function mountFilesystem(options: FilesystemOptions): Promise<Filesystem> {
  const { type } = options;
  if (type === 'tmpfs') return mountTmpfs(options);
  const image = scratchPath(`${type}.img`);
  writeFileSync(image, '');
  truncateSync(image, options.size);
  let loop: Loop | undefined;
  try {
    loop = await attachLoop({ file: image, sectorSize: options.sectorSize ?? 512 });
    const [command, ...args] = mkfs[type];
    await mustRun(command, [...args, ...(options.mkfsArgs ?? []), loop.device]);
    const mounted = await mount(type, loop.device, options.mountOptions);
    return filesystem(type, mounted, loop);
  } catch (error) {
    await loop?.dispose();
    rmSync(image, { force: true });
    throw error;
  }
}

async function mountTmpfs(options: FilesystemOptions): Promise<Filesystem> {
  const mountOptions = [`size=${options.size}`, ...(options.mountOptions ?? [])];
  return filesystem('tmpfs', await mount('tmpfs', 'tmpfs', mountOptions), null);
}

export interface Overlay extends AsyncDisposable {
  path: string;
  /** The folder below that is never written. */
  lower: string;
}

/** An overlay whose layers are folders of another file system. */
export async function mountOverlay({ path: base }: Filesystem): Promise<Overlay> {
  const [lower, upper, work] = ['lower', 'upper', 'work'].map((name) => `${base}/${name}`);
  for (const folder of [lower!, upper!, work!]) mkdirSync(folder);
  const layers = [`lowerdir=${lower}`, `upperdir=${upper}`, `workdir=${work}`];
  const { path, unmount } = await mount('overlay', 'overlay', layers);
  return { path, lower: lower!, [Symbol.asyncDispose]: unmount };
}

interface Mount {
  path: string;
  unmount(): Promise<void>;
}

async function mount(
  type: FilesystemType | 'overlay',
  source: string,
  options: string[] = [],
): Promise<Mount> {
  const path = scratchPath(`${type}.mnt`);
  mkdirSync(path);
  const flags = options.length > 0 ? ['-o', options.join(',')] : [];
  await mustRun('mount', ['-t', kernelNames[type], ...flags, source, path]);
  const unmount = hold({
    release: () => unmountWhenIdle(path),
    // Whatever still uses it belongs to the process that is ending: leave it to the kernel.
    releaseSync: () => execFileSync('umount', ['--lazy', path]),
  });
  return { path, unmount };
}

async function unmountWhenIdle(path: string): Promise<void> {
  try {
    await waitFor(`${path} to be idle`, () => unmountOnce(path), { timeout: 5_000, interval: 50 });
  } catch (error) {
    await run('umount', ['--lazy', path]);
    throw error;
  }
  rmdirSync(path);
}

async function unmountOnce(path: string): Promise<boolean> {
  const { status, stderr } = await run('umount', [path]);
  if (status !== 0 && !/busy/i.test(stderr)) throw new Error(`umount: ${stderr}`);
  return status === 0;
}

function filesystem(type: FilesystemType, { path, unmount }: Mount, loop: Loop | null): Filesystem {
  const dispose = async (): Promise<void> => {
    await unmount();
    await loop?.dispose();
    if (loop) rmSync(loop.file, { force: true });
  };
  return {
    path,
    type,
    device: loop?.device ?? null,
    image: loop?.file ?? null,
    dispose,
    [Symbol.asyncDispose]: dispose,
  };
}
