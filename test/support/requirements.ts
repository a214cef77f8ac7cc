import { accessSync, constants } from 'node:fs';
import { delimiter, join } from 'node:path';
import { haveGuestParts } from './guest-image.js';

export interface Requirements {
  root?: true;
  loop?: true;
  /** What startGuest needs. */
  guest?: true;
  tools?: string[];
}

const announced = new Set<string>();

/**
 * For describe.runIf(): true when everything is there. What is missing is said aloud, and in CI
 * it is an error, so that no test is ever skipped there unseen.
 */
export function requires(requirements: Requirements): boolean {
  const lacking = missing(requirements);
  if (lacking.length === 0) return true;
  const message = `missing for these tests: ${lacking.join(', ')}`;
  if (process.env.CI) throw new Error(message);
  if (!announced.has(message)) process.stderr.write(`SKIPPED: ${message}\n`);
  announced.add(message);
  return false;
}

const guestTools = ['qemu-system-x86_64', 'qemu-img', 'gcc'];

function missing({ root, loop, guest, tools = [] }: Requirements): string[] {
  const lacking = [...tools, ...(guest ? guestTools : [])].filter((tool) => !onPath(tool));
  if (guest && !haveGuestParts()) lacking.push('a kernel for guests (node scripts/setup.mjs test)');
  if (root && process.geteuid?.() !== 0) lacking.push('root');
  if (loop && !accessible('/dev/loop-control', constants.R_OK | constants.W_OK)) {
    lacking.push('loop devices');
  }
  return lacking;
}

function onPath(tool: string): boolean {
  const folders = (process.env.PATH ?? '').split(delimiter);
  return folders.some((folder) => accessible(join(folder, tool), constants.X_OK));
}

function accessible(path: string, mode: number): boolean {
  try {
    accessSync(path, mode);
    return true;
  } catch {
    return false;
  }
}
