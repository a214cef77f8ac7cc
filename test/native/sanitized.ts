import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { mustRun, repository, run, type Outcome } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';

const jobs = ['--parallel', '2'];

/** Builds the C++ unit tests with ASan and UBSan, and gives their path. */
export async function buildUnitTests(): Promise<string> {
  const folder = join(repository, 'build-asan/unit');
  await mustRun('cmake', ['-S', repository, '-B', folder, '-DTHICKEN_SANITIZE=ON']);
  await mustRun('cmake', ['--build', folder, '--target', 'thicken_tests', ...jobs]);
  return join(folder, 'thicken_tests');
}

/** Builds the addon with ASan and UBSan through cmake-js, and gives its path. */
export async function buildAddon(): Promise<string> {
  const cmakeJs = join(repository, 'node_modules/cmake-js/bin/cmake-js');
  const folder = join(repository, 'build-asan/addon');
  const options = ['--directory', repository, '--out', folder, '--CDTHICKEN_SANITIZE=ON', ...jobs];
  await mustRun(process.execPath, [cmakeJs, 'build', ...options]);
  return join(folder, 'Release/thicken.node');
}

export interface SanitizedOutcome extends Outcome {
  reports: string;
}

/** Runs Node with the sanitized addon, and collects what the sanitizers find in it and its children. */
export async function runSanitized(
  addon: string,
  args: readonly string[],
  env: NodeJS.ProcessEnv = {},
): Promise<SanitizedOutcome> {
  const log = scratchPath('sanitizer');
  // The runtime has to come before all else in a process that is not itself built with it.
  const runtime = (await mustRun('g++', ['-print-file-name=libasan.so'])).trim();
  const outcome = await run(process.execPath, args, {
    cwd: repository,
    env: {
      ...env,
      THICKEN_ADDON: addon,
      LD_PRELOAD: runtime,
      // Node itself leaves memory to the end of its process.
      ASAN_OPTIONS: `detect_leaks=0:log_path=${log}`,
      UBSAN_OPTIONS: `print_stacktrace=1:log_path=${log}`,
    },
  });
  return { ...outcome, reports: reportsIn(log) + faults(outcome.stderr) };
}

function reportsIn(log: string): string {
  const folder = join(log, '..');
  const files = readdirSync(folder).map((name) => join(folder, name));
  return files
    .filter((file) => file.startsWith(`${log}.`))
    .map((file) => faults(readFileSync(file, 'utf8')))
    .join('');
}

/** QEMU's coroutines make ASan warn that it may be wrong about them: no report. */
function faults(text: string): string {
  return /ERROR: \w+Sanitizer|runtime error:/.test(text) ? text : '';
}
