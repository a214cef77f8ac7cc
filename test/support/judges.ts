import { stat } from 'node:fs/promises';
import { mustRun, run } from './processes.js';

/** One extent as the kernel tells it through filefrag; bytes. */
export interface FilefragExtent {
  offset: number;
  physical: number;
  length: number;
  flags: string[];
}

/** Sorted by offset; holes are what lies between. tmpfs has no FIEMAP, and so no answer. */
export async function filefrag(path: string): Promise<FilefragExtent[]> {
  // Without the sync, delayed allocations would show as delalloc.
  const text = await mustRun('filefrag', ['-s', '-v', '-b1', path]);
  const extents = text.split('\n').flatMap(parseFilefragLine);
  return extents.sort((a, b) => a.offset - b.offset);
}

const filefragLine =
  /^\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+)\.\.\s*\d+:\s*(\d+):(?:\s*\d+:)?\s*([a-z_0-9x,]*)\s*$/;

function parseFilefragLine(line: string): FilefragExtent[] {
  const match = filefragLine.exec(line);
  if (!match) return [];
  const flags = (match[4] ?? '').split(',').filter((flag) => flag !== '');
  return [{ offset: Number(match[1]), physical: Number(match[2]), length: Number(match[3]), flags }];
}

export interface QemuExtent {
  start: number;
  length: number;
  depth: number;
  present: boolean;
  zero: boolean;
  data: boolean;
  offset?: number;
}

export async function qemuMap(path: string, format = 'raw'): Promise<QemuExtent[]> {
  const text = await mustRun('qemu-img', ['map', '-U', '--output=json', '-f', format, path]);
  return JSON.parse(text) as QemuExtent[];
}

/** The storage behind the file, what lies past its end included. */
export async function hostBytes(path: string): Promise<number> {
  return (await stat(path)).blocks * 512;
}

/** Whether a guest reads the same from both; what one lacks at its end counts as zeros. */
export async function qemuCompare(
  a: string,
  b: string,
  { formatA = 'raw', formatB = 'raw' }: { formatA?: string; formatB?: string } = {},
): Promise<boolean> {
  const { status, stderr } = await run('qemu-img', ['compare', '-U', '-f', formatA, '-F', formatB, a, b]);
  if (status !== 0 && status !== 1) throw new Error(`qemu-img compare: ${stderr}`);
  return status === 0;
}
