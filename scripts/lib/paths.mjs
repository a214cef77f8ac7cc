import { fileURLToPath } from 'node:url';
import { join } from 'node:path';

export const root = fileURLToPath(new URL('../../', import.meta.url)).replace(/\/$/, '');
export const inRoot = (...parts) => join(root, ...parts);

/** What setup itself leaves: its lock, and the output of its last steps. */
export const workshop = inRoot('build-setup');
