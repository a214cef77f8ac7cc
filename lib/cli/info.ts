import { open } from '../open.js';
import type { ImageInfo } from '../types.js';
import { formatBytes } from '../units.js';
import { openOptionsOf, type CommonOptions } from './options.js';
import { plain, print, printJson, styled, warn } from './output.js';

export async function info([target = '']: string[], options: CommonOptions): Promise<number> {
  await using image = await open(target, openOptionsOf(options));
  const facts = await image.info();
  if (options.json) {
    await printJson(facts);
  } else {
    await print(renderInfo(facts));
  }
  warn(facts.warnings);
  return 0;
}

const BY = { option: 'as told', suffix: 'by its header and name', probe: 'by a probe' };

export function renderInfo(info: ImageInfo): string {
  const rows: [string, string][] = [
    ['image', plain(info.target)],
    ['kind', info.kind],
    ['format', `${info.format} (${BY[info.formatBy]})`],
    ['virtual size', size(info.virtualSize)],
    ['file size', size(info.fileSize)],
    ['host storage', size(info.hostAllocated)],
    ['allocated', share(info.allocated, info.virtualSize)],
    ['missing', share(info.missing, info.virtualSize)],
    ['needed', `falloc ${size(info.needed.falloc)}, full ${size(info.needed.full)}`],
    ['granularity', size(info.granularity)],
    ['in use', useOf(info)],
    ['file system', filesystemOf(info)],
    ...info.backing.map((layer): [string, string] => ['backing', plain(layer.path)]),
  ];
  return rows.map(([name, text]) => `${styled('bold', name.padEnd(13))} ${text}\n`).join('');
}

function size(bytes: number | null): string {
  if (bytes === null) return 'unknown';
  return bytes < 1024 ? formatBytes(bytes) : `${formatBytes(bytes)} (${bytes} bytes)`;
}

function share(bytes: number | null, of: number | null): string {
  if (bytes === null || !of) return size(bytes);
  return `${size(bytes)}, ${((bytes / of) * 100).toFixed(1)}%`;
}

function useOf({ inUse }: ImageInfo): string {
  if (!inUse) return 'no';
  const locks = inUse.locks.length > 0 ? `, locks on bytes ${inUse.locks.join(' ')}` : '';
  return `by ${plain(inUse.by) || 'a process that can’t be seen from here'}${locks}`;
}

function filesystemOf({ filesystem }: ImageInfo): string {
  if (!filesystem) return 'unknown';
  const { type, free, abilities, cow, reflinked } = filesystem;
  const facts = [
    `${formatBytes(free)} free`,
    abilities.length > 0 ? `has ${abilities.join(', ')}` : '',
    cow ? 'copies on write' : '',
    reflinked ? 'shares extents with another file' : '',
  ];
  return `${type}: ${facts.filter(Boolean).join('; ')}`;
}
