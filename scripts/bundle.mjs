/**
 * `node scripts/bundle.mjs MODULES FOLDER`: joins what tsc made of lib/ into few files, since each that
 * Node loads costs the start of a process up to half a millisecond (Node 20).
 */
import { readFileSync } from 'node:fs';
import { join, relative } from 'node:path';
import { rolldown } from 'rolldown';
import { inRoot, root } from './lib/paths.mjs';

const [modules, folder] = process.argv.slice(2);

/** What is loaded by its name: by programs, by the shell, and by scripts/install.mjs. */
const entries = ['index', 'cli/main', 'native'];

/**
 * What is loaded together, from the leaves up: each file takes these modules, and all that they
 * import which no file before it has. An `import()` still loads nothing before it runs.
 */
const files = {
  base: ['errors', 'units', 'throttle'],
  addon: ['native'],
  core: ['open'],
  options: ['cli/options', 'cli/output', 'cli/table'],
  targets: ['cli/targets'],
  qmp: ['qmp/client', 'qmp/job-control'],
  qcow2: ['qcow2/image'],
  nbd: ['nbd/client', 'nbd/status-stream'],
  headers: ['chain/header'],
  keys: ['secret'],
  qemu: ['qemu/backing', 'qemu/nbd-extents'],
};

const sourceOf = (module) => inRoot('lib', `${module}.ts`);
const moduleOf = (source) => relative(inRoot('lib'), source).replace(/\.ts$/, '');

/** tsc's output in the place of its sources, so that comments and stack traces name these. */
const compiled = {
  name: 'compiled',
  load(source) {
    const file = join(modules, `${moduleOf(source)}.js`);
    return { code: readFileSync(file, 'utf8'), map: readFileSync(`${file}.map`, 'utf8'), moduleType: 'js' };
  },
};

const bundle = await rolldown({
  cwd: root,
  input: Object.fromEntries(entries.map((module) => [module, sourceOf(module)])),
  platform: 'node',
  external: /^[^./]/,
  resolve: { extensionAlias: { '.js': ['.ts'] } },
  plugins: [compiled],
  onLog(level, { message }) {
    throw new Error(`${level}: ${message}`);
  },
});
const { output } = await bundle.write({
  dir: folder,
  format: 'esm',
  sourcemap: true,
  // As tsc does; the package has no lib/ to show.
  sourcemapExcludeSources: true,
  minifyInternalExports: false,
  codeSplitting: { groups: Object.entries(files).map(group) },
  chunkFileNames: ({ facadeModuleId, name }) => `${facadeModuleId ? moduleOf(facadeModuleId) : name}.js`,
});
await bundle.close();
requireListed(output.filter(({ type }) => type === 'chunk'));

function group([name, listed]) {
  return { name, test: (source) => listed.includes(moduleOf(source)) };
}

/** A module that was renamed must not leave its file unseen. */
function requireListed(chunks) {
  const lacking = Object.entries(files).flatMap(([name, listed]) => {
    const chunk = chunks.find(({ fileName }) => fileName === `${name}.js`);
    const found = chunk?.moduleIds.map(moduleOf) ?? [];
    return listed.filter((module) => !found.includes(module)).map((module) => `${module} in ${name}.js`);
  });
  if (lacking.length > 0) throw new Error(`not bundled as scripts/bundle.mjs says: ${lacking.join(', ')}`);
}
