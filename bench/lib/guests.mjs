/** The guests of the tests, for trials: compiled, and without the test runner. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { repository } from './build.mjs';

const output = join(repository, 'build-guests');

/** Compiles test/support. Its modules find this clone two folders above themselves, as their sources do. */
export function buildGuests() {
  const tsc = join(repository, 'node_modules/typescript/bin/tsc');
  const options = [
    ...['--noCheck', '--skipLibCheck', '--module', 'NodeNext', '--target', 'ES2022'],
    ...['--rootDir', join(repository, 'test'), '--outDir', output],
  ];
  execFileSync(process.execPath, [tsc, ...options, join(repository, 'test/support/guest.ts')], { stdio: 'inherit' });
  // Nothing calls back at the end of a trial; its process cleans up when it exits.
  const runner = join(output, 'node_modules/vitest');
  mkdirSync(runner, { recursive: true });
  writeFileSync(join(runner, 'package.json'), '{"type":"module","exports":"./index.js"}\n');
  writeFileSync(join(runner, 'index.js'), 'export const afterAll = () => undefined;\n');
}
