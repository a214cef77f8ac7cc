/**
 * npm's install script: leaves an installed package with an addon that loads, prebuilt or built
 * here by the node-gyp that npm brings.
 */
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));

// A clone (the package has no such file) builds by its own scripts, when they run.
const isClone = existsSync(fileURLToPath(new URL('setup.mjs', import.meta.url)));
const fromSource = process.env.npm_config_build_from_source === 'true';

if (!isClone && (fromSource || !(await loads()))) build();

/** In the very way that the library does. */
async function loads() {
  try {
    const { native } = await import('../dist/native.js');
    native();
    return true;
  } catch {
    return false;
  }
}

function build() {
  const given = process.env.npm_config_node_gyp;
  const [command, ...first] = given ? [process.execPath, given] : ['node-gyp'];
  const { status, error } = spawnSync(command, [...first, 'rebuild'], {
    cwd: root,
    stdio: 'inherit',
  });
  if (status === 0) return;
  const remedy = 'it takes g++, make and python3 (Debian: apt-get install g++ make python3)';
  const cause = error ? `: ${error.message}` : '';
  process.stderr.write(`thicken: the native addon could not be built${cause}; ${remedy}\n`);
  process.exit(1);
}
