/** What the tests of disks at rest share: a folder of their own for what thicken makes, processes by their arguments. */
import { mkdirSync, readdirSync, readFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { afterEach, expect } from 'vitest';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';

// What thicken makes in the folder for temporary files can then be told from anybody else's.
process.env.TMPDIR = scratchPath('t');
mkdirSync(process.env.TMPDIR);

afterEach(async () => {
  await expectNothingLeft();
});

export const withDaemon = requires({ tools: ['qemu-storage-daemon', 'qemu-img', 'qemu-io'] });

/** Processes that carry a text in their arguments: the test file's folder, for one. */
export function processesWith(text: string): { pid: number; args: string[] }[] {
  return readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map((name) => ({ pid: Number(name), args: argumentsOf(name) }))
    .filter(({ args, pid }) => pid !== process.pid && args.some((arg) => arg.includes(text)));
}

/** Empty for one that has gone, or that nobody has reaped. */
function argumentsOf(pid: string): string[] {
  try {
    return readFileSync(`/proc/${pid}/cmdline`, 'latin1').split('\0');
  } catch {
    return [];
  }
}

/** The daemons themselves, without their guardians. */
export function daemonsIn(folder: string): number[] {
  const found = processesWith(folder);
  return found.filter(({ args }) => args[0]!.endsWith('qemu-storage-daemon')).map(({ pid }) => pid);
}

/** No daemon, no guardian, no folder; what was killed takes a moment to go. */
export async function expectNothingLeft(): Promise<void> {
  const left = () => [
    ...processesWith(`${tmpdir()}/thicken-`).map(({ args }) => args.join(' ').slice(0, 100)),
    ...readdirSync(tmpdir()),
  ];
  await waitFor('all to be gone', () => left().length === 0, { timeout: 30_000 }).catch(() => undefined);
  expect(left(), 'left').toEqual([]);
}
