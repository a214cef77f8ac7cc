import { mustRun } from './processes.js';

/** Runs commands of qemu-io on an image at rest. */
export async function qemuIo(path: string, format: string, ...commands: string[]): Promise<void> {
  await mustRun('qemu-io', ['-f', format, ...commands.flatMap((command) => ['-c', command]), path]);
}
