import { execFileSync } from 'node:child_process';
import { cpus, release, totalmem } from 'node:os';

/** What a reader must know to make sense of the numbers. */
export function machineFacts() {
  return {
    kernel: release(),
    cpu: cpus()[0]?.model ?? 'unknown',
    cores: cpus().length,
    memoryGiB: Math.round(totalmem() / 2 ** 30),
    node: process.version,
    qemu: firstLine('qemu-img', ['--version']),
    coreutils: firstLine('cp', ['--version']),
    utilLinux: firstLine('fallocate', ['--version']),
  };
}

function firstLine(command, args) {
  try {
    return execFileSync(command, args, { encoding: 'utf8' }).split('\n')[0];
  } catch {
    return 'missing';
  }
}
