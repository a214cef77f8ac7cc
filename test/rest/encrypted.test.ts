/** Encrypted images at rest: no key is needed to give them storage. */
import { describe, expect, it } from 'vitest';
import type { AllocationResult } from '../../lib/types.js';
import { cliJson, MiB, missing, type Refusal } from '../storage/helpers.js';
import { mustRun, run } from '../support/processes.js';
import { createEncrypted } from '../support/qemu-io.js';
import { random } from '../support/patterns.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';

const SIZE = 24 * MiB;
const SECRET = ['--object', 'secret,id=key,data=of-the-tests'];
const CASES = [
  { name: 'luks', stated: 'raw', options: 'key-secret=key,iter-time=10', image: 'driver=luks,key-secret=key' },
  {
    name: 'qcow2',
    stated: 'qcow2',
    options: 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10',
    image: 'driver=qcow2,encrypt.key-secret=key',
  },
];

describe.runIf(requires({ tools: ['qemu-img', 'qemu-io', 'filefrag'] })).each(CASES)('$name, encrypted', ({ name, stated, options, image }) => {
  const named = (path: string) => `${image},file.filename=${path}`;

  async function makeImage(): Promise<{ path: string; copy: string }> {
    const path = scratchPath(`image.${name}`);
    await createEncrypted('-f', name, ...SECRET, '-o', options, path, String(SIZE));
    const writes = ['write -q -P 7 1100k 70k', 'write -q -P 9 12287k 5k'].flatMap((write) => ['-c', write]);
    await mustRun('qemu-io', [...SECRET, ...writes, '--image-opts', named(path)]);
    const copy = scratchPath('copy.raw');
    await mustRun('qemu-img', ['convert', ...SECRET, '--image-opts', '-O', 'raw', named(path), copy]);
    return { path, copy };
  }

  const next = random(3);
  const ranges = [[0, SIZE], ...Array.from({ length: 3 }, () => [next() % (SIZE / 2), 1 + (next() % (SIZE / 2))])];

  it.each(ranges.map(([offset, length]) => ({ offset: offset!, length: length! })))(
    'gets storage, from $offset on $length bytes',
    { timeout: 120_000 },
    async ({ offset, length }) => {
      for (const level of ['falloc', 'full'] as const) {
        const { path, copy } = await makeImage();
        const outcome = await cliJson<AllocationResult>([
          ...['allocate', path, '--format', stated, '--preallocation', level],
          ...['--offset', String(offset), '--length', String(length)],
        ]);
        expect(outcome.status, outcome.stderr).toBe(0);
        expect(outcome.document).toMatchObject({ verified: true, guarantee: true });
        const { effective } = outcome.document;
        if (stated === 'raw') expect(await missing(path, level, effective)).toEqual([]);
        else expect(await mustRun('qemu-img', ['check', ...SECRET, '--image-opts', named(path)])).toMatch(/No errors/);
        const compared = await run('qemu-img', [
          ...['compare', ...SECRET, '--image-opts', named(path), `driver=raw,file.filename=${copy}`],
        ]);
        expect(compared.status, compared.stdout + compared.stderr).toBe(0);
      }
    },
  );
});

describe.runIf(requires({ tools: ['qemu-img'] }))('a LUKS container', () => {
  it('is told how to be allocated', async () => {
    const path = scratchPath('image.luks');
    await createEncrypted('-f', 'luks', ...SECRET, '-o', 'key-secret=key,iter-time=10', path, '1M');
    const outcome = await cliJson<Refusal>(['allocate', '--format', 'luks', path]);
    expect([outcome.status, outcome.document.error.code]).toEqual([1, 'UNSUPPORTED']);
    expect(outcome.document.error.message).toMatch(/--format raw/);
  });
});
