import { mustRun, run, type Outcome } from './processes.js';
import { waitFor } from './wait.js';

/** Runs commands of qemu-io on an image at rest. */
export async function qemuIo(path: string, format: string, ...commands: string[]): Promise<void> {
  await mustRun('qemu-io', ['-f', format, ...commands.flatMap((command) => ['-c', command]), path]);
}

/** `qemu-img create` of an image with LUKS. */
export function createEncrypted(...args: string[]): Promise<void> {
  return untilTimed(() => run('qemu-img', ['create', '-q', ...args]));
}

/**
 * What makes an image with LUKS times how fast it hashes, and gives up where the kernel has counted no CPU
 * time yet (seen about once in twenty here).
 */
export async function untilTimed(create: () => Promise<Outcome>): Promise<void> {
  await waitFor('qemu-img to measure its CPU time', async () => {
    const { status, stderr } = await create();
    if (status !== 0 && !/CPU usage/.test(stderr)) throw new Error(stderr);
    return status === 0;
  });
}
