import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { hold } from './cleanup.js';

let folder: string | undefined;
let counter = 0;

/** This test file's own folder, on a real disk: /tmp may be a tmpfs, which has no FIEMAP. */
export function scratch(): string {
  folder ??= createFolder();
  return folder;
}

/** A path in the scratch folder that nothing has used yet. */
export function scratchPath(name = 'file'): string {
  return join(scratch(), `${++counter}-${name}`);
}

function createFolder(): string {
  const created = mkdtempSync(join(process.env.THICKEN_SCRATCH ?? '/var/tmp', 'thicken-test-'));
  const remove = (): void => {
    folder = undefined;
    rmSync(created, { recursive: true, force: true });
  };
  hold({ release: async () => remove(), releaseSync: remove });
  return created;
}
