import { createHash } from 'node:crypto';
import { existsSync, readdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { basename, join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { cpio, type CpioEntry } from './cpio.js';
import { mustRun, repository } from './processes.js';
import { scratchPath } from './scratch.js';

export interface GuestImage {
  kernel: string;
  initramfs: string;
}

/** What `scripts/setup.mjs test` has taken out of Debian's packages. */
const parts = join(repository, 'build-setup/guest-parts');
const kernel = join(parts, 'vmlinuz');
const sources = join(repository, 'test/support/guest');
const cache = join(repository, 'build-setup');
const cachedName = /^guest-[0-9a-f]{64}\.cpio\.gz$/;

const compiler = ['-std=gnu11', '-D_GNU_SOURCE', '-O2', '-static', '-pthread'];
const warnings = ['-Wall', '-Wextra', '-Wconversion', '-Werror'];
const modules = ['virtio_pci', 'virtio_blk', 'virtio_console'];

export function haveGuestParts(): boolean {
  return existsSync(kernel);
}

/** Builds the first file system of the guests if its sources have changed since the last time. */
export async function guestImage(): Promise<GuestImage> {
  if (!haveGuestParts()) throw new Error(`no ${kernel}; run: node scripts/setup.mjs test`);
  const name = `guest-${fingerprint()}.cpio.gz`;
  const initramfs = join(cache, name);
  if (!existsSync(initramfs)) await build(name);
  return { kernel, initramfs };
}

function fingerprint(): string {
  const hash = createHash('sha256').update(JSON.stringify([compiler, modules]));
  const own = ['cpio.ts', 'guest-image.ts'].map((name) => join(repository, 'test/support', name));
  const needed = modulesInOrder().map(({ path }) => path);
  for (const path of [...sourceFiles(/\.[ch]$/), ...own, ...needed, join(parts, 'busybox')]) {
    const content = readFileSync(path);
    hash.update(`${basename(path)} ${content.length}\n`).update(content);
  }
  return hash.digest('hex');
}

function sourceFiles(ending: RegExp): string[] {
  const names = readdirSync(sources).filter((name) => ending.test(name));
  return names.sort().map((name) => join(sources, name));
}

async function build(name: string): Promise<void> {
  const program = scratchPath('guest-init');
  await mustRun('gcc', [...compiler, ...warnings, '-o', program, ...sourceFiles(/\.c$/)]);
  const entries: CpioEntry[] = [
    { name: 'bin' },
    { name: 'modules' },
    { name: 'init', content: readFileSync(program) },
    { name: 'bin/busybox', content: readFileSync(join(parts, 'busybox')) },
    ...modulesInOrder().map(({ path }, index) => ({
      name: `modules/${String(index).padStart(2, '0')}-${basename(path)}`,
      content: readFileSync(path),
    })),
  ];
  // Renamed into place: other workers may build the same at this moment.
  const fresh = join(cache, `${name}.${process.pid}`);
  writeFileSync(fresh, gzipSync(cpio(entries), { level: 6 }));
  renameSync(fresh, join(cache, name));
  for (const old of readdirSync(cache)) {
    if (cachedName.test(old) && old !== name) rmSync(join(cache, old), { force: true });
  }
}

interface Module {
  name: string;
  path: string;
}

/** The modules and all that they depend on, each after its own. */
function modulesInOrder(): Module[] {
  const found = new Map<string, string>();
  for (const path of readdirSync(join(parts, 'modules'), { recursive: true, encoding: 'utf8' })) {
    if (path.endsWith('.ko')) found.set(basename(path, '.ko'), join(parts, 'modules', path));
  }
  const order = new Map<string, Module>();
  const add = (name: string): void => {
    if (order.has(name)) return;
    const path = found.get(name);
    if (path === undefined) throw new Error(`no module ${name} in ${parts}`);
    dependenciesOf(path).forEach(add);
    order.set(name, { name, path });
  };
  modules.forEach(add);
  return [...order.values()];
}

/** A module carries the answer itself; modules.dep is made only where a kernel is installed. */
function dependenciesOf(path: string): string[] {
  const text = readFileSync(path, 'latin1');
  const names = /\0depends=([^\0]*)\0/.exec(text)?.[1] ?? '';
  return names.split(',').filter((name) => name !== '');
}
