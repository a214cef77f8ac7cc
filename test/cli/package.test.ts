import { mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join, normalize } from 'node:path';
import { beforeAll, describe, expect, test } from 'vitest';
import { mustRun, repository, run } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';

/** What the shell, programs and the install script load. */
const ENTRIES = ['dist/cli/main.js', 'dist/index.js', 'dist/native.js'];

interface Packed {
  filename: string;
  files: { path: string }[];
}

/** As somebody's dependency; its own dependencies and the addon are this clone's. */
async function install(): Promise<{ app: string; files: string[] }> {
  const app = scratchPath('app');
  const installed = join(app, 'node_modules/thicken');
  mkdirSync(installed, { recursive: true });
  const text = await mustRun('npm', ['pack', '--json', '--ignore-scripts', '--pack-destination', app], { cwd: repository });
  const [packed] = JSON.parse(text) as [Packed];
  await mustRun('tar', ['-xf', join(app, packed.filename), '-C', installed, '--strip-components=1']);
  for (const name of ['build', 'node_modules']) {
    rmSync(join(installed, name), { recursive: true, force: true });
    symlinkSync(join(repository, name), join(installed, name));
  }
  return { app, files: packed.files.map(({ path }) => path) };
}

const isLazy = /\bimport\(\s*["'](\.[^"']+)["']/g;
const isEager = /^(?:import|export)\b[^;]*?["'](\.[^"']+)["'];/gm;

function importsOf(file: string, pattern: RegExp): string[] {
  const text = readFileSync(join(repository, file), 'utf8');
  return [...text.matchAll(pattern)].map(([, name]) => normalize(join(dirname(file), name!)));
}

/** Files that are loaded with these, at once or also later. */
function loadedWith(files: string[], patterns = [isEager]): string[] {
  const found = new Set(files);
  for (const file of found) for (const pattern of patterns) importsOf(file, pattern).forEach((name) => found.add(name));
  return [...found].sort();
}

describe('the package', () => {
  let app: string;
  let files: string[];
  beforeAll(async () => ({ app, files } = await install()));

  const script = (text: string) => run(process.execPath, ['--enable-source-maps', '--input-type=module', '-e', text], { cwd: app });

  test('has no code but what is loaded from its ways in, with maps', () => {
    const code = files.filter((file) => /^dist\/.*\.js$/.test(file)).sort();
    expect(code).toEqual(loadedWith(ENTRIES, [isEager, isLazy]));
    const maps = files.filter((file) => file.endsWith('.map')).sort();
    expect(maps).toEqual(expect.arrayContaining(['dist/cli/main.js.map', 'dist/core.js.map']));
    expect(code).toEqual(expect.arrayContaining(maps.map((file) => file.replace(/\.map$/, ''))));
  });

  test('has all types that its types refer to', () => {
    const declarations = files.filter((file) => file.endsWith('.d.ts'));
    expect(declarations).toContain('dist/index.d.ts');
    const named = declarations.flatMap((file) => importsOf(file, isEager)).map((file) => file.replace(/\.js$/, '.d.ts'));
    expect(declarations).toEqual(expect.arrayContaining([...new Set(named)]));
  });

  test('finds its addon, and builds none', async () => {
    const env = { npm_config_node_gyp: '/nowhere' };
    const { status, stderr } = await run(process.execPath, ['node_modules/thicken/scripts/install.mjs'], { cwd: app, env });
    expect(stderr).toBe('');
    expect(status).toBe(0);
  });

  test('runs as a command', async () => {
    writeFileSync(join(app, 'disk.raw'), 'x'.repeat(4096));
    const { status, stdout, stderr } = await run(join(app, 'node_modules/thicken/dist/cli/main.js'), ['info', '--json', 'disk.raw'], { cwd: app });
    expect(stderr).toBe('');
    expect(status).toBe(0);
    expect(JSON.parse(stdout)).toMatchObject({ format: 'raw', virtualSize: 4096 });
  });

  test('has stacks that name its sources', async () => {
    const { stdout, stderr } = await script(`
      import { open, ThickenError } from 'thicken';
      const error = await open('nowhere.raw').catch((error) => error);
      console.log(error instanceof ThickenError, error.stack);
    `);
    expect(stderr).toBe('');
    expect(stdout).toMatch(/^true /);
    expect(stdout).toMatch(/node_modules\/thicken\/lib\/target\.ts:\d+/);
  });
});

describe('what is loaded', () => {
  test('before a command runs is neither the addon nor the library', () => {
    expect(loadedWith(['dist/cli/main.js'])).toEqual(['dist/base.js', 'dist/cli/main.js', 'dist/options.js']);
  });

  test.each(['info', 'map', 'allocate', 'verify'])('for %s has no client, and nothing of formats', (command) => {
    const files = loadedWith([`dist/cli/${command}.js`]);
    expect(files).toContain('dist/core.js');
    for (const file of ['qcow2', 'qmp', 'nbd', 'qemu']) expect(files).not.toContain(`dist/${file}.js`);
  });

  test('for jobs has no images', () => {
    expect(loadedWith(['dist/cli/jobs.js'])).not.toContain('dist/core.js');
  });

  test('for a qcow2 image has no QEMU', () => {
    expect(loadedWith(['dist/qcow2/image.js'])).not.toContain('dist/qemu.js');
  });
});
