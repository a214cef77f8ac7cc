import { afterAll } from 'vitest';

/** Something of the machine's that must be given back: a process, a mount, a loop device, a folder. */
export interface Holding {
  release(): Promise<void>;
  /** The same for the ways out that leave no time for promises. */
  releaseSync(): void;
}

const held: Holding[] = [];

/** Keeps a holding until the returned function is called, or until the test file or its process ends. */
export function hold(holding: Holding): () => Promise<void> {
  held.push(holding);
  let released: Promise<void> | undefined;
  return () => {
    released ??= holding.release().then(() => forget(holding));
    return released;
  };
}

function forget(holding: Holding): void {
  const index = held.indexOf(holding);
  if (index >= 0) held.splice(index, 1);
}

/** Newest first, since a mount lies on a loop device that lies in a folder. */
export async function releaseAll(): Promise<void> {
  const failures: unknown[] = [];
  for (let holding = held.at(-1); holding; holding = held.at(-1)) {
    await holding.release().catch((error: unknown) => failures.push(error));
    forget(holding);
  }
  if (failures.length > 0) throw new AggregateError(failures, failures.map(String).join('\n'));
}

function releaseAllSync(): void {
  for (let holding = held.pop(); holding; holding = held.pop()) {
    try {
      holding.releaseSync();
    } catch (error) {
      process.stderr.write(`clean-up: ${String(error)}\n`);
    }
  }
}

// An unmount writes back what is dirty: on a busy disk that took more than two minutes.
afterAll(releaseAll, 300_000);
process.on('exit', releaseAllSync);
for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
  process.once(signal, () => {
    releaseAllSync();
    process.kill(process.pid, signal);
  });
}
// A worker outlives a vitest that was killed; with a signal, since vitest forbids process.exit.
process.once('disconnect', () => {
  if (held.length > 0) process.kill(process.pid, 'SIGTERM');
});
