#!/usr/bin/env node
/**
 * `node scripts/setup.mjs MODE`: installs and builds what the npm script of that name needs, and
 * is done at once where nothing is missing. Needs nothing but Node.
 */
import { setup, setupLocked } from './lib/setup.mjs';
import { modes } from './lib/tools.mjs';

const [mode, locked] = process.argv.slice(2);
try {
  if (!modes.includes(mode)) throw new Error(`say what for: ${modes.join(', ')}`);
  if (locked === '--locked') setupLocked(mode);
  else setup(mode);
} catch (error) {
  process.stderr.write(`setup: ${error.message}\n`);
  process.exitCode = 1;
}
