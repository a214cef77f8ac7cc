import { execFileSync } from 'node:child_process';
import { mkdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

export const repository = fileURLToPath(new URL('../../', import.meta.url));
const sources = join(repository, 'bench/c');
const output = join(repository, 'build-bench');

/** Path of one of the C programs, compiled if its source is newer. */
export function program(name) {
  const source = join(sources, `${name}.c`);
  const binary = join(output, name);
  if (newest(source, join(sources, 'common.h')) < newest(binary)) return binary;
  mkdirSync(output, { recursive: true });
  const flags = ['-std=c11', '-O2', '-Wall', '-Wextra', '-Werror'];
  execFileSync('cc', [...flags, '-o', binary, source], { stdio: 'inherit' });
  return binary;
}

function newest(...files) {
  return Math.max(...files.map((file) => statSync(file, { throwIfNoEntry: false })?.mtimeMs ?? 0));
}
