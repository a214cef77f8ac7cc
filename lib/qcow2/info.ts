/** What `info` tells of a qcow2 image. */
import { fileUse } from '../exclusive.js';
import type { JobImage } from '../job-image.js';
import type { Qcow2Facts } from '../native.js';
import type { Survey } from '../plan.js';
import { spaceOf } from '../space.js';
import type { ByteRange, ImageInfo, Preallocation } from '../types.js';
import { findNeeds, NONE_BACKED, wholeSize } from './needs.js';
import type { Qcow2Files } from './tables.js';

interface Found {
  image: JobImage;
  formatBy: ImageInfo['formatBy'];
  facts: Qcow2Facts;
  files: Qcow2Files;
  survey: Survey;
  /** Bytes. */
  hostAllocated: number;
  fileSize: number;
  range: ByteRange;
}

export async function infoOf(found: Found): Promise<ImageInfo> {
  const { image, facts, files, survey } = found;
  const { use, unsure } = await fileUse(files.file.file);
  const unseen = unsure ? ['whether something else uses the image can’t be told from here'] : [];
  const { needed, warning } = await neededOf(found);
  return {
    target: image.path,
    kind: 'file',
    format: image.format,
    formatBy: found.formatBy,
    virtualSize: image.size,
    fileSize: found.fileSize,
    hostAllocated: found.hostAllocated,
    allocated: image.exact ? survey.met : null,
    missing: image.exact ? survey.missing : null,
    needed,
    granularity: image.granularity,
    inUse: use,
    filesystem: await filesystemOf(found),
    backing: backingOf(facts),
    snapshots: facts.snapshots,
    warnings: [...image.warnings, ...unseen, ...warning],
  };
}

/** What stands in the header: nothing of it is opened. */
function backingOf({ backed, backingFile, backingFormat }: Qcow2Facts): ImageInfo['backing'] {
  return backed ? [{ path: backingFile ?? '', format: backingFormat, virtualSize: null }] : [];
}

/** As if nothing came from a backing file: every cluster may have to be mapped. */
async function neededOf({ files, range, facts }: Found) {
  const sizes = { metadata: null, falloc: null, full: null } as ImageInfo['needed'];
  for (const level of ['metadata', 'falloc'] as Preallocation[]) {
    const { needs, refusal } = await findNeeds(files, { range, level, backingEnd: NONE_BACKED });
    if (refusal) return { needed: sizes, warning: [`what it needs can’t be told: ${refusal.message}`] };
    const outside = facts.externalData ? range.length : 0;
    sizes[level] = level === 'metadata' ? wholeSize({ ...needs, data: 0 }) : wholeSize(needs) + outside;
  }
  return { needed: { ...sizes, full: sizes.falloc }, warning: [] };
}

async function filesystemOf({ survey, files }: Found): Promise<ImageInfo['filesystem']> {
  const { filesystem, method } = files.file;
  const space = await spaceOf(files.file);
  const abilities = Object.entries(filesystem.abilities);
  return {
    type: filesystem.type,
    free: space.available,
    abilities: abilities.filter(([, has]) => has).map(([name]) => name),
    cow: filesystem.cow,
    reflinked: method === 'fiemap' ? survey.shared > 0 : null,
  };
}
