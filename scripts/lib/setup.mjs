import { spawnSync } from 'node:child_process';
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { guestParts } from './guest-parts.mjs';
import { inRoot, workshop } from './paths.mjs';
import { products } from './products.mjs';
import { installPackages, missingPackages } from './tools.mjs';

/** Brings the clone to where `mode` can run. Throws, or ends the process, where that fails. */
export function setup(mode) {
  if (isReady(mode)) return;
  mkdirSync(workshop, { recursive: true });
  const self = inRoot('scripts/setup.mjs');
  // flock(1) because the kernel drops the lock with its holder, however that one ends.
  const command = [join(workshop, 'lock'), process.execPath, self, mode, '--locked'];
  const { status, error } = spawnSync('flock', command, { stdio: ['ignore', 2, 2] });
  if (error) throw new Error(`flock, of the package util-linux: ${error.message}`);
  if (status !== 0) process.exit(status ?? 1);
}

/** The work itself, for the holder of the lock. Whoever had it before may have done it all. */
export function setupLocked(mode) {
  const packages = missingPackages(mode);
  if (packages.length > 0) installPackages(packages);
  for (const product of productsFor(mode)) if (!product.current()) product.make();
}

function productsFor(mode) {
  return mode === 'test' || mode === 'bench' ? [...products, guestParts] : products;
}

function isReady(mode) {
  return missingPackages(mode).length === 0 && productsFor(mode).every((product) => product.current());
}
