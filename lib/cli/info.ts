import type { GuestDisk } from '../qemu/disks.js';
import type { ImageInfo } from '../types.js';
import { formatBytes } from '../units.js';
import { type CommonOptions, type QemuOptions } from './options.js';
import { plain, print, printJson, styled, warn } from './output.js';
import { renderTable, type Column } from './table.js';
import { disksOf, openNamed } from './targets.js';

type Options = CommonOptions & QemuOptions;

export async function info([path]: string[], options: Options): Promise<number> {
  if (options.qmp !== undefined && !options.device) return listAll(options.qmp, options);
  await using image = await openNamed(path, options);
  const facts = await image.info();
  if (options.json) {
    await printJson(facts);
  } else {
    await print(renderInfo(facts));
  }
  warn(facts.warnings);
  return 0;
}

/** Of a monitor without a device: the disks that there are. */
async function listAll(qmp: string, { json }: Options): Promise<number> {
  const disks = await disksOf(qmp);
  if (json) {
    await printJson(disks.map(summaryOf));
  } else {
    const rows = disks.map((disk) => [disk.name, disk.format, formatBytes(disk.size), stateOf(disk), disk.file]);
    await print(await renderTable(DISK_COLUMNS, rows.map((row) => row.map(plain)), true));
  }
  return 0;
}

const DISK_COLUMNS: Column[] = ['device', 'format', 'size', 'backing', 'file'].map((head) => ({ head }));

function stateOf({ backing, readOnly }: GuestDisk): string {
  const layers = backing.length === 0 ? 'none' : `${backing.length} below`;
  return readOnly ? `${layers}, read-only` : layers;
}

function summaryOf({ name, names, node, format, size: virtualSize, readOnly, backing, snapshots, file }: GuestDisk) {
  return { device: name, names, node, format, virtualSize, readOnly, backing, snapshots, file };
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
    ...info.backing.map((layer): [string, string] => ['backing', layerOf(layer)]),
  ];
  return rows.map(([name, text]) => `${styled('bold', name.padEnd(13))} ${text}\n`).join('');
}

function layerOf({ path, format, virtualSize, allocated }: ImageInfo['backing'][number]): string {
  const facts = [
    format ?? 'format not recorded',
    virtualSize === null ? 'not opened' : formatBytes(virtualSize),
    allocated === undefined ? '' : `${formatBytes(allocated)} of the image`,
  ];
  return `${plain(path)} (${plain(facts.filter(Boolean).join(', '))})`;
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
