#!/usr/bin/env node
/** The command line from a clone: set up on stderr, then run in this very process. */
import { inRoot } from './lib/paths.mjs';
import { setup } from './lib/setup.mjs';

try {
  setup('build');
} catch (error) {
  process.stderr.write(`setup: ${error.message}\n`);
  process.exit(1);
}
const main = inRoot('dist/cli/main.js');
process.argv.splice(1, 1, main);
// npm runs scripts in the package's folder; paths are meant from where the user stands.
if (process.env.npm_lifecycle_event === 'thicken' && process.env.INIT_CWD) {
  process.chdir(process.env.INIT_CWD);
}
await import(main);
