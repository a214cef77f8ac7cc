import { describe, expect, it } from 'vitest';
import type { ImageInfo, MapEntry, Verdict } from '../../lib/types.js';
import { mountFilesystem, mountOverlay } from '../support/filesystems.js';
import { makePattern, sha256 } from '../support/patterns.js';
import { requires } from '../support/requirements.js';
import { allocate, bytesOf, cliJson, EXT4, mixedSegments, missing, MKFS_TOOLS, TOOLS, XFS } from './helpers.js';

const runnable = requires({ root: true, loop: true, tools: [...TOOLS, ...MKFS_TOOLS] });

/** What the root of a container usually is. */
describe.runIf(runnable).each([EXT4, XFS])('overlayfs on $name', (storage) => {
  it.each(['upper', 'lower'] as const)('has a file of its %s layer allocated, without a guarantee', async (layer) => {
    await using mounted = await mountFilesystem(storage);
    await using overlay = await mountOverlay(mounted);
    const path = `${overlay.path}/disk.raw`;
    await makePattern(layer === 'upper' ? path : `${overlay.lower}/disk.raw`, mixedSegments());
    const content = await sha256(path);
    const lacking = bytesOf(await missing(path, 'falloc'));

    const info = await cliJson<ImageInfo>(['info', path]);
    expect(info.status, info.stderr).toBe(0);
    expect(info.document).toMatchObject({ missing: lacking, granularity: 4096, filesystem: { type: 'overlayfs' } });
    const map = await cliJson<MapEntry[]>(['map', path]);
    expect(bytesOf(map.document.filter(({ host }) => host === 'hole').map(({ start, length }) => ({ offset: start, length })))).toBe(lacking);

    const result = await allocate(path);
    // xfs copies a file up by sharing its extents, and overlayfs can't unshare.
    const shared = storage === XFS && layer === 'lower';
    expect(result).toMatchObject({ verified: !shared, guarantee: false });
    expect(result.warnings.join('\n')).toMatch(/no guarantee: overlayfs/);
    expect(await missing(path, 'falloc')).toEqual([]);
    expect(await sha256(path)).toBe(content);
    expect((await cliJson<Verdict>(['verify', path])).document).toMatchObject({ satisfied: false });
  });
});
