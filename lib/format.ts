/** Which format an image has, and by whose word. */
import { extname } from 'node:path';
import { errors, usageError } from './errors.js';

/** Formats that thicken knows by name, with their magic bytes and usual suffixes. */
const FORMATS: { name: string; at: number; magic: Buffer; suffixes: string[] }[] = [
  { name: 'qcow2', at: 0, magic: Buffer.from('QFI\xfb', 'latin1'), suffixes: ['.qcow2', '.qcow'] },
  { name: 'qed', at: 0, magic: Buffer.from('QED\0', 'latin1'), suffixes: ['.qed'] },
  { name: 'vmdk', at: 0, magic: Buffer.from('KDMV'), suffixes: ['.vmdk'] },
  { name: 'vmdk', at: 0, magic: Buffer.from('COWD'), suffixes: ['.vmdk'] },
  { name: 'vmdk', at: 0, magic: Buffer.from('# Disk DescriptorFile'), suffixes: ['.vmdk'] },
  { name: 'vdi', at: 64, magic: Buffer.from([0x7f, 0x10, 0xda, 0xbe]), suffixes: ['.vdi'] },
  { name: 'vhdx', at: 0, magic: Buffer.from('vhdxfile'), suffixes: ['.vhdx'] },
  { name: 'vpc', at: 0, magic: Buffer.from('conectix'), suffixes: ['.vhd', '.vpc'] },
  { name: 'parallels', at: 0, magic: Buffer.from('WithoutFreeSpace'), suffixes: ['.hdd', '.hds'] },
  { name: 'parallels', at: 0, magic: Buffer.from('WithouFreSpacExt'), suffixes: ['.hdd', '.hds'] },
  {
    name: 'luks',
    at: 0,
    magic: Buffer.from('LUKS\xba\xbe', 'latin1'),
    suffixes: ['.luks'],
  },
];

/** Bytes from the start of an image that tell its format. */
export const PROBE_LENGTH = 512;

export interface Format {
  name: string;
  by: 'option' | 'suffix' | 'probe';
  /** A probed format other than raw that only its bytes speak for: not to be acted on. */
  doubtful: boolean;
}

/** `stated` is the caller's word, and final. Throws USAGE for a name that no image format has. */
export function formatOf(path: string, head: Uint8Array, stated: string | undefined): Format {
  if (stated !== undefined) return { name: checkName(stated), by: 'option', doubtful: false };
  const found = FORMATS.find(({ at, magic }) => magic.equals(head.subarray(at, at + magic.length)));
  if (!found) return { name: 'raw', by: 'probe', doubtful: false };
  const named = found.suffixes.includes(extname(path).toLowerCase());
  return { name: found.name, by: named ? 'suffix' : 'probe', doubtful: !named };
}

function checkName(name: string): string {
  if (name === 'raw' || FORMATS.some((format) => format.name === name)) return name;
  const known = ['raw', ...new Set(FORMATS.map((format) => format.name))].join(', ');
  throw usageError(`format ${JSON.stringify(name)} is not known`, `use one of ${known}`);
}

/** Throws FORMAT_REQUIRED where only a probe speaks for a format that is not raw. */
export function requireStated(path: string, format: Format): void {
  if (format.doubtful) throw errors.formatRequired(path, format.name);
}

/** Throws FORMAT_REQUIRED or UNSUPPORTED unless the image can be acted on as raw. */
export function requireRaw(path: string, format: Format, kind: 'file' | 'block'): void {
  requireStated(path, format);
  if (format.name === 'raw') return;
  if (format.name === 'qcow2' && kind === 'block') throw errors.qcow2OnDevice(path);
  throw errors.unsupportedFormat(path, format.name);
}
