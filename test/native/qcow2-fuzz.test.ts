import { appendFileSync, existsSync, mkdirSync, readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { mustRun, repository, run } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { allCases, generator, make } from './qcow2-cases.js';
import { check, CLEAN, KiB, qemuImg, qemuIo, soak } from './qcow2-tool.js';

const able = requires({ tools: ['cmake', 'clang++-14', 'qemu-img', 'qemu-io', 'flock'] }) && hasLibFuzzer();
const seed = Number(process.env.THICKEN_SEED ?? 4711);
const amount = soak ? ['-max_total_time=1200'] : ['-runs=15000'];

/** Without it clang is there, and links nothing. */
function hasLibFuzzer(): boolean {
  const folder = '/usr/lib/llvm-14/lib/clang';
  const files = existsSync(folder) ? readdirSync(folder, { recursive: true, encoding: 'utf8' }) : [];
  if (files.some((name) => name.includes('libclang_rt.fuzzer'))) return true;
  if (process.env.CI) throw new Error('missing for these tests: libclang-rt-14-dev');
  process.stderr.write('SKIPPED: missing for these tests: libclang-rt-14-dev\n');
  return false;
}

async function buildFuzzer(): Promise<string> {
  const folder = join(repository, 'build-asan/qcow2-fuzz');
  await mustRun('mkdir', ['-p', folder]);
  const compiler = ['-DCMAKE_CXX_COMPILER=clang++-14', '-DTHICKEN_FUZZ=ON'];
  for (const args of [['-S', repository, '-B', folder, ...compiler], ['--build', folder, '--target', 'qcow2_fuzz']]) {
    await mustRun('flock', [folder, 'cmake', ...args]);
  }
  return join(folder, 'qcow2_fuzz');
}

/** Small images of every kind, each followed by the bytes that choose the request. */
async function makeCorpus(folder: string): Promise<number> {
  const next = generator(seed);
  const choose = (file: string): void => appendFileSync(file, Buffer.from(Array.from({ length: 8 }, () => next(256))));
  const cases = allCases().filter(({ clusterSize, extended }) => clusterSize === 512 && !extended);
  for (const [i, one] of cases.entries()) {
    const file = join(folder, `${i}`);
    await make(file, one, seed + i, 96 * KiB + 512);
    choose(file);
  }
  const others = ['extended_l2=on,cluster_size=16k', `data_file=${join(folder, 'data')},data_file_raw=on,cluster_size=512`];
  for (const [i, options] of others.entries()) {
    const file = join(folder, `other-${i}`);
    await qemuImg('create', '-q', '-f', 'qcow2', '-o', options, file, String(200 * KiB));
    await qemuIo(file, ['write -P 7 10k 3k', 'write -z 100k 33k']);
    await qemuImg('bitmap', '--add', file, 'b0');
    expect(await check(file)).toEqual(CLEAN);
    choose(file);
  }
  return cases.length + others.length;
}

describe.runIf(able)('qcow2 images made of anything', { timeout: 1_800_000 }, () => {
  let fuzzer: string;

  beforeAll(async () => {
    fuzzer = await buildFuzzer();
  }, 600_000);

  it('are refused, or keep their content', async () => {
    const folder = scratchPath('corpus');
    mkdirSync(folder);
    expect(await makeCorpus(folder)).toBeGreaterThan(40);
    // What was found outlives the test: it may take hours to be found again.
    const artifacts = join(dirname(fuzzer), 'finding-');
    const options = [...amount, `-seed=${seed}`, '-max_len=300000', '-len_control=0', '-rss_limit_mb=2048', '-timeout=30'];
    const { status, stderr } = await run(fuzzer, [...options, `-artifact_prefix=${artifacts}`, folder], {
      timeout: 1_700_000,
    });
    expect(status, stderr.slice(-4000)).toBe(0);
    expect(stderr).toMatch(/Done \d{4,} runs/);
  });
});
