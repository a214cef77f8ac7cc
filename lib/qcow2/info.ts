/** What `info` reads from the tables of a qcow2 image, and from its file. */
import { fileUse } from '../exclusive.js';
import type { JobImage } from '../job-image.js';
import type { Qcow2Facts } from '../native.js';
import type { Survey } from '../plan.js';
import { filesystemInfo } from '../space.js';
import type { ByteRange, ImageInfo, Preallocation } from '../types.js';
import { findNeeds, NONE_BACKED, wholeSize } from './needs.js';
import type { Qcow2Files } from './tables.js';

interface Found {
  image: JobImage;
  facts: Qcow2Facts;
  files: Qcow2Files;
  survey: Survey;
  range: ByteRange;
}

export async function infoOf(found: Found): Promise<Partial<ImageInfo>> {
  const { image, facts, files, survey } = found;
  const { use, warnings } = await fileUse(files.file.file);
  const { needed, warning } = await neededOf(found);
  const reflinked = files.file.method === 'fiemap' ? survey.shared > 0 : null;
  return {
    ...(image.exact && { allocated: survey.met, missing: survey.missing }),
    needed,
    inUse: use,
    filesystem: await filesystemInfo(files.file, reflinked),
    backing: backingOf(facts),
    snapshots: facts.snapshots,
    warnings: [...image.warnings, ...warnings, ...warning],
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
