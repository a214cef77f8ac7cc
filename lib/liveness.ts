/** Whether others use an image while a run goes on. */
import type { Descriptor } from './descriptor.js';
import { probeConflicts } from './exclusive.js';
import { native } from './native.js';

/** How long an answer is good for. */
const GOOD_MS = 1000;

export interface Liveness {
  /** Looked at before the first change. */
  start(): Promise<void>;
  /** Whether a guest uses the image, and wants time between chunks. */
  live(): Promise<boolean>;
}

/** A guest's QEMU has it open, and says so. */
export const ALWAYS_LIVE: Liveness = {
  start: () => Promise.resolve(),
  live: () => Promise.resolve(true),
};

/** Nobody has it open but us. */
export const NEVER_LIVE: Liveness = {
  start: () => Promise.resolve(),
  live: () => Promise.resolve(false),
};

/**
 * Of a file. Once a route has it open for writing itself, only QEMU's locks tell of a guest that
 * came later.
 */
export class FileLiveness implements Liveness {
  private found = false;
  private at = -Infinity;

  constructor(
    private readonly descriptor: Descriptor,
    private readonly kind: 'file' | 'block',
  ) {}

  async start(): Promise<void> {
    this.found = await this.hasWriter();
    this.at = performance.now();
  }

  /** A cautious yes where that can't be told. */
  private async hasWriter(): Promise<boolean> {
    if (this.kind !== 'file') return false;
    return this.descriptor.use((fd) => native().probeWriter(fd).catch(() => true));
  }

  async live(): Promise<boolean> {
    const now = performance.now();
    if (this.found || now - this.at < GOOD_MS) return this.found;
    this.at = now;
    this.found = (await probeConflicts(this.descriptor)).length > 0;
    return this.found;
  }
}
