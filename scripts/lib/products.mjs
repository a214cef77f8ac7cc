import { chmodSync, existsSync, readFileSync, readdirSync, renameSync, rmSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { inRoot } from './paths.mjs';
import { Stamp, fingerprint } from './stamp.mjs';
import { step } from './step.mjs';

/**
 * What setup makes, in this order: `current` tells whether it is as its sources are, `make` makes
 * it so.
 */
export const products = [
  { current: dependenciesMatchLock, make: installDependencies },
  stamped({
    files: ['build/Release/thicken.node'],
    stamp: new Stamp(inRoot('build/.thicken-stamp')),
    sources: () =>
      fingerprint(
        [...addonSources(), 'binding.gyp', 'package-lock.json'].map((name) => inRoot(name)),
        [process.versions.modules, process.arch],
      ),
    make: buildAddon,
  }),
  stamped({
    files: ['dist/index.js', 'build-modules/index.js'],
    stamp: new Stamp(inRoot('dist/.thicken-stamp')),
    sources: () =>
      fingerprint(
        ['lib', 'scripts/bundle.mjs', 'tsconfig.json', 'package-lock.json'].map((name) => inRoot(name)),
      ),
    make: buildTypeScript,
  }),
];

function addonSources() {
  const names = readdirSync(inRoot('native')).filter((name) => name !== 'test');
  return names.sort().map((name) => `native/${name}`);
}

function stamped({ files, stamp, sources, make }) {
  return {
    current: () => files.every((file) => existsSync(inRoot(file))) && stamp.is(sources()),
    make() {
      // Taken first: an edit during the work must make it stale.
      const from = sources();
      stamp.remove();
      make();
      stamp.write(from);
    },
  };
}

/** Compares with the lock file that npm leaves in node_modules at the end of each install. */
function dependenciesMatchLock() {
  const [wanted, installed] = ['package-lock.json', 'node_modules/.package-lock.json'].map(packages);
  if (wanted === undefined || installed === undefined) return false;
  const names = new Set([...Object.keys(wanted), ...Object.keys(installed)]);
  names.delete('');
  return [...names].every((name) => {
    // Those for other platforms are left out.
    if (installed[name] === undefined) return wanted[name].optional ?? wanted[name].devOptional;
    return wanted[name]?.version === installed[name].version;
  });
}

function packages(file) {
  try {
    return JSON.parse(readFileSync(inRoot(file), 'utf8')).packages;
  } catch {
    return undefined;
  }
}

function installDependencies() {
  // npm tells the scripts that it runs where it is; it need not be on the PATH.
  const npm = process.env.npm_execpath;
  const [command, ...first] = npm?.endsWith('.js') ? [process.execPath, npm] : ['npm'];
  const options = ['--ignore-scripts', '--include=dev', '--no-audit', '--no-fund'];
  step('dependencies', command, [...first, 'ci', ...options]);
}

function buildAddon() {
  const nodeGyp = inRoot('node_modules/node-gyp/bin/node-gyp.js');
  const args = [nodeGyp, 'configure', 'build', ...localHeaders()];
  step('native addon', process.execPath, args, { env: { ...process.env, JOBS: 'max' } });
}

/** The headers that came with this very Node, if it has any: node-gyp would download them. */
function localHeaders() {
  if (process.env.npm_config_nodedir) return [];
  const prefix = join(dirname(process.execPath), '..');
  const [major, minor, patch] = process.versions.node.split('.');
  try {
    const header = readFileSync(join(prefix, 'include/node/node_version.h'), 'utf8');
    const says = (name, number) => new RegExp(`#define ${name} ${number}\\b`).test(header);
    const same =
      says('NODE_MAJOR_VERSION', major) &&
      says('NODE_MINOR_VERSION', minor) &&
      says('NODE_PATCH_VERSION', patch);
    return same ? [`--nodedir=${prefix}`] : [];
  } catch {
    return [];
  }
}

/** The modules each by itself, for what tests and trials take from within; and what the package has. */
function buildTypeScript() {
  const fresh = { modules: inRoot('build-modules-new'), dist: inRoot('build-dist') };
  for (const folder of Object.values(fresh)) rmSync(folder, { recursive: true, force: true });
  const tsc = [inRoot('node_modules/typescript/bin/tsc'), '-p', inRoot('tsconfig.json')];
  const places = ['--outDir', fresh.modules, '--declarationDir', fresh.dist];
  step('TypeScript', process.execPath, [...tsc, ...places]);
  const bundle = [inRoot('scripts/bundle.mjs'), fresh.modules, fresh.dist];
  step('bundle', process.execPath, bundle);
  chmodSync(join(fresh.dist, 'cli/main.js'), 0o755);
  swapIn(fresh.modules, inRoot('build-modules'));
  swapIn(fresh.dist, inRoot('dist'));
}

/** In whole: who runs from there sees the old or the new, and no file of a deleted source. */
function swapIn(fresh, place) {
  const old = inRoot('build-old');
  rmSync(old, { recursive: true, force: true });
  if (existsSync(place)) renameSync(place, old);
  renameSync(fresh, place);
  rmSync(old, { recursive: true, force: true });
}
