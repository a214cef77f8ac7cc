/** The kinds of image that there are. */
import { blockKind } from './block.js';
import { fileKind } from './file.js';
import { guestKind } from './guest.js';
import { qcow2Kind } from './qcow2.js';
import type { Kind, PlanFacts } from './kind.js';
import { nbdKind } from './nbd.js';
import { storedKind } from './stored.js';

export type { Kind, PlanFacts, PlanRequest } from './kind.js';

export const KINDS: Record<PlanFacts['kind'], Kind> = {
  file: fileKind,
  block: blockKind,
  guest: guestKind,
  nbd: nbdKind,
  stored: storedKind,
  qcow2: qcow2Kind,
};
