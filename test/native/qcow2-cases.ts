import { KiB, MiB, qemuImg, qemuIo } from './qcow2-tool.js';

export const FILLS = ['empty', 'random', 'zeros', 'discards', 'compressed'] as const;
export type Fill = (typeof FILLS)[number];

export interface Case {
  name: string;
  clusterSize: number;
  version: 2 | 3;
  refcountBits: number;
  extended: boolean;
  snapshots: number;
  fill: Fill;
}

/** Not a multiple of the cluster, nor of what one L2 table describes. */
const SIZES = new Map([
  [512, 2 * MiB + 3 * 512],
  [4 * KiB, 10 * MiB + 512],
  [64 * KiB, 48 * MiB + 1024],
  [2048 * KiB, 200 * MiB + 512],
]);

export const sizeOf = ({ clusterSize }: Pick<Case, 'clusterSize'>): number => SIZES.get(clusterSize) ?? 16 * MiB;

function isAllowed({ clusterSize, version, refcountBits, extended, snapshots }: Omit<Case, 'name'>): boolean {
  if (version === 2 && (refcountBits !== 16 || extended)) return false;
  if (extended && clusterSize < 16 * KiB) return false;
  return snapshots === 0 || refcountBits > 1;
}

export function allCases(): Case[] {
  const cases = [...SIZES.keys()].flatMap((clusterSize) =>
    ([2, 3] as const).flatMap((version) =>
      [1, 8, 16, 64].flatMap((refcountBits) =>
        [false, true].flatMap((extended) =>
          [0, 2].flatMap((snapshots) =>
            FILLS.map((fill) => ({ clusterSize, version, refcountBits, extended, snapshots, fill })),
          ),
        ),
      ),
    ),
  );
  return cases.filter(isAllowed).map((one) => ({ ...one, name: nameOf(one) }));
}

function nameOf({ clusterSize, version, refcountBits, extended, snapshots, fill }: Omit<Case, 'name'>): string {
  const parts = [`v${version}`, `cluster ${clusterSize}`, `refcount ${refcountBits}`, fill];
  if (extended) parts.push('extended L2');
  if (snapshots > 0) parts.push(`${snapshots} snapshots`);
  return parts.join(', ');
}

/** Small repeatable generator: a test that fails must fail again. */
export function generator(seed: number): (below: number) => number {
  let state = seed >>> 0;
  return (below) => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
}

export async function create(file: string, one: Omit<Case, 'name' | 'fill' | 'snapshots'>, size: number): Promise<void> {
  const options = [`cluster_size=${one.clusterSize}`, `compat=${one.version === 2 ? '0.10' : '1.1'}`];
  if (one.version === 3) options.push(`refcount_bits=${one.refcountBits}`);
  if (one.extended) options.push('extended_l2=on');
  await qemuImg('create', '-q', '-f', 'qcow2', '-o', options.join(), file, String(size));
}

/** An image as the case describes it; what it holds depends on the seed. */
export async function make(file: string, one: Case, seed: number, size = sizeOf(one)): Promise<void> {
  const next = generator(seed);
  await create(file, one, size);
  for (let layer = 0; layer <= one.snapshots; layer++) {
    await fill(file, one, next, size, layer);
    if (layer < one.snapshots) await qemuImg('snapshot', '-c', `s${layer}`, file);
  }
}

async function fill(
  file: string,
  one: Case,
  next: (below: number) => number,
  size: number,
  layer: number,
): Promise<void> {
  const place = (unit: number, most: number): string => {
    const length = unit * (1 + next(most));
    const offset = unit * next(Math.floor((size - length) / unit));
    return `${offset} ${length}`;
  };
  const unit = one.clusterSize;
  const write = (): string => `write -P ${1 + next(250)} ${place(512, Math.max(3, (4 * unit) / 512))}`;
  const commands: Record<Fill, () => string[]> = {
    empty: () => [],
    random: () => Array.from({ length: 12 }, write),
    zeros: () => [write(), write(), ...Array.from({ length: 8 }, () => `write -z ${place(512, (6 * unit) / 512)}`)],
    discards: () => [
      ...Array.from({ length: 8 }, () => `write -P 77 ${place(unit, 20)}`),
      ...Array.from({ length: 8 }, () => `discard ${place(unit, 10)}`),
      `write -z -u ${place(unit, 10)}`,
    ],
    // QEMU refuses to compress a cluster that has been written before.
    compressed: () => [
      ...Array.from({ length: 8 }, (_, i) => `write -c -P ${next(250)} ${unit * (4 * (layer * 8 + i) + next(4))} ${unit}`),
      `write -P 99 ${96 * unit + 512 * next(4)} ${3 * unit}`,
    ],
  };
  await qemuIo(file, commands[one.fill](), ['-f', 'qcow2', '-d', 'unmap']);
}
