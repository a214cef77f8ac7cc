import { spawnSync } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { root, workshop } from './paths.mjs';

/** Runs a command behind one line on stderr; its output is shown only if it fails, and then whole. */
export function step(title, command, args, options = {}) {
  process.stderr.write(`setup: ${title}\n`);
  mkdirSync(workshop, { recursive: true });
  const log = join(workshop, 'output.log');
  // One file for both streams keeps their lines in order.
  const output = openSync(log, 'w');
  const { status, signal, error } = spawnSync(command, args, {
    cwd: root,
    ...options,
    stdio: ['ignore', output, output],
  });
  closeSync(output);
  if (status === 0) return;
  process.stderr.write(readFileSync(log));
  throw new Error(`${command} ${args.join(' ')}: ${error?.message ?? signal ?? `status ${status}`}`);
}
