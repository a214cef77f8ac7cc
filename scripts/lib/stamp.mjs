import { createHash } from 'node:crypto';
import { readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** A hash over the names and contents of files and of everything in folders, and over `facts`. */
export function fingerprint(paths, facts = []) {
  const hash = createHash('sha256').update(JSON.stringify(facts));
  for (const path of paths.flatMap(filesOf)) {
    const content = readFileSync(path);
    hash.update(`${path}\0${content.length}\0`).update(content);
  }
  return hash.digest('hex');
}

function filesOf(path) {
  const entries = listing(path);
  if (entries === undefined) return [path];
  return entries.sort().flatMap((name) => filesOf(join(path, name)));
}

function listing(path) {
  try {
    return readdirSync(path);
  } catch (error) {
    if (error.code === 'ENOTDIR') return undefined;
    throw error;
  }
}

/** A file beside what was made that tells from what. */
export class Stamp {
  #path;

  constructor(path) {
    this.#path = path;
  }

  is(value) {
    try {
      return readFileSync(this.#path, 'utf8') === value;
    } catch {
      return false;
    }
  }

  /** Before the work begins: what is half made must never pass for made. */
  remove() {
    rmSync(this.#path, { force: true });
  }

  write(value) {
    writeFileSync(this.#path, value);
  }
}
