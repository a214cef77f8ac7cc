#!/usr/bin/env node
/** All checks that need no run of the program; every failure is shown, then the exit status is 1. */
import { execFile } from 'node:child_process';
import { createRequire } from 'node:module';
import { readFileSync, readdirSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import { join } from 'node:path';
import { inRoot, root } from './lib/paths.mjs';

const require = createRequire(import.meta.url);

const warnings = [
  ...['all', 'extra', 'pedantic', 'shadow', 'conversion', 'sign-conversion', 'old-style-cast'],
  ...['cast-align', 'cast-qual', 'non-virtual-dtor', 'overloaded-virtual', 'null-dereference'],
  ...['duplicated-cond', 'logical-op', 'format=2', 'undef', 'missing-declarations', 'error'],
].map((name) => `-W${name}`);

const sources = readdirSync(inRoot('native'), { recursive: true })
  .filter((name) => /\.(cc|h)$/.test(name))
  .map((name) => join('native', name))
  .sort();
const programs = {
  eslint: inRoot('node_modules/eslint/bin/eslint.js'),
  tsc: inRoot('node_modules/typescript/bin/tsc'),
};

const checks = [
  node('eslint', [programs.eslint, '--max-warnings', '0', '.']),
  node('types of lib', [programs.tsc, '--noEmit', '-p', 'tsconfig.json']),
  node('types of test', [programs.tsc, '-p', 'tsconfig.test.json']),
  check('clang-format', 'clang-format-14', ['--dry-run', '-Werror', ...sources]),
  ...sources.filter((source) => source.endsWith('.cc')).map(compilation),
];

const failures = await runAll(checks);
process.stdout.write(`lint: ${checks.length} checks, ${failures} failed\n`);
process.exitCode = failures > 0 ? 1 : 0;

function check(name, command, args) {
  return { name, command, args };
}

function node(name, args) {
  return check(name, process.execPath, args);
}

/** The release build's code, with the warnings that others' headers would not pass. */
function compilation(source) {
  const others = [require('node-addon-api').include.replaceAll('"', ''), nodeApiHeaders()];
  return check(`warnings of ${source}`, 'g++', [
    ...['-std=c++17', '-O2', ...warnings, ...definitions()],
    ...others.flatMap((folder) => ['-isystem', folder]),
    ...['-c', source, '-o', '/dev/null'],
  ]);
}

/** Those of cmake-js, for which Node's own need not be installed. */
function nodeApiHeaders() {
  const owner = createRequire(require.resolve('cmake-js/package.json'));
  return owner('node-api-headers').include_dir;
}

function definitions() {
  const { targets } = JSON.parse(readFileSync(inRoot('binding.gyp'), 'utf8'));
  return targets[0].defines.map((definition) => `-D${definition}`);
}

async function runAll(all) {
  const queue = [...all];
  let failures = 0;
  const work = async () => {
    for (let next = queue.shift(); next; next = queue.shift()) {
      const { ok, output } = await run(next);
      if (ok) continue;
      failures++;
      process.stdout.write(`lint: ${next.name} failed\n${output}\n`);
    }
  };
  await Promise.all(Array.from({ length: availableParallelism() }, work));
  return failures;
}

function run({ command, args }) {
  return new Promise((resolve) => {
    execFile(command, args, { cwd: root, maxBuffer: 2 ** 28 }, (error, stdout, stderr) => {
      const output = `${stdout}${stderr}`;
      resolve({ ok: error === null, output: output || String(error?.message) });
    });
  });
}
