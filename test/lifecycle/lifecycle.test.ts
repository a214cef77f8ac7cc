import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { describe, expect, it } from 'vitest';
import { open, ThickenError } from '../../lib/index.js';
import { mountFilesystem } from '../support/filesystems.js';
import { hostBytes, qemuCompare } from '../support/judges.js';
import { makePattern, sha256, type Segment } from '../support/patterns.js';
import { repository, run, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { allocate, EXT3, KiB, makeSparse, MiB, missing, soak, TOOLS } from '../storage/helpers.js';

const runnable = requires({ tools: [...TOOLS, 'cp'] });
const withLoop = requires({ root: true, loop: true, tools: [...TOOLS, 'mkfs.ext4'] });
const library = pathToFileURL(join(repository, 'dist/index.js')).href;

/** Many extents: a scan of them takes a while. */
function fine(count: number): Segment[] {
  const pair: Segment[] = [
    { kind: 'hole', length: 4 * KiB },
    { kind: 'data', length: 4 * KiB },
  ];
  return Array.from({ length: count }, () => pair).flat();
}

function descriptors(): number {
  return readdirSync('/proc/self/fd').length;
}

/** A script in a process of its own: what crashes there must not take the tests with it. */
async function script(source: string, args: readonly string[], flags: readonly string[] = []) {
  const outcome = await run(process.execPath, [...flags, '--input-type=module', '-e', source, ...args]);
  expect(outcome.signal, outcome.stderr).toBeNull();
  expect(outcome.status, outcome.stderr).toBe(0);
  return outcome;
}

describe.runIf(runnable)('close()', () => {
  it('during a scan waits for the page in flight; the scan then ends or says so', async () => {
    const path = scratchPath('scan.raw');
    await makePattern(path, fine(20_000));
    const before = descriptors();
    for (let i = 0; i < 20; i++) {
      const image = await open(path);
      const scan = (async () => {
        let count = 0;
        for await (const _extent of image.extents()) if (++count === i * 1000) void image.close();
        return count;
      })().catch((error: ThickenError) => error.code);
      if (i === 0) await image.close();
      const end = await scan;
      if (typeof end === 'number') expect(end).toBe(40_000);
      else expect(end).toBe('CLOSED');
      await image.close();
    }
    expect(descriptors()).toBe(before);
  });

  it('during several scans at once leaves none hanging', async () => {
    const path = scratchPath('scans.raw');
    await makePattern(path, fine(20_000));
    const before = descriptors();
    const image = await open(path);
    const scans = Array.from({ length: 12 }, () => image.verify().catch((error: ThickenError) => error.code));
    await image.close();
    for (const end of await Promise.all(scans)) {
      if (typeof end === 'string') expect(end).toBe('CLOSED');
    }
    expect(descriptors()).toBe(before);
  });

  it.each(['falloc', 'full'] as const)('during an allocation cancels it and gives all back (%s)', async (level) => {
    const path = makeSparse(scratchPath('job.raw'), 64 * MiB);
    const before = descriptors();
    const image = await open(path);
    const job = image.allocate({ preallocation: level, speed: 32 * MiB });
    await waitFor('the job to move', () => job.progress().position > 0);
    await image.close();
    await expect(job.result).rejects.toMatchObject({ code: 'CANCELLED' });
    expect(descriptors()).toBe(before);
    expect(() => image.allocate()).toThrow(/closed/);
    await expect(image.verify()).rejects.toMatchObject({ code: 'CLOSED' });
    await image.close();
    expect(await allocate(path, '--preallocation', level)).toMatchObject({ verified: true });
  });

  it('at once after allocate(), and many times at once, is safe', async () => {
    const path = makeSparse(scratchPath('at-once.raw'), 8 * MiB);
    const before = descriptors();
    for (let i = 0; i < 20; i++) {
      const image = await open(path);
      const job = image.allocate({ preallocation: 'full' });
      await Promise.all([image.close(), image.close(), image[Symbol.asyncDispose]()]);
      await expect(job.result).rejects.toMatchObject({ code: expect.stringMatching(/^(CANCELLED|CLOSED)$/) as string });
    }
    expect(descriptors()).toBe(before);
  });

  it('leaves no descriptor behind when open fails', async () => {
    const before = descriptors();
    for (let i = 0; i < 20; i++) {
      await expect(open('/dev/null')).rejects.toThrow();
      await expect(open(scratchPath('none'))).rejects.toThrow();
      await expect(open(makeSparse(scratchPath('x'), 1), { format: 'nonsense' })).rejects.toThrow();
    }
    expect(descriptors()).toBe(before);
  });
});

describe.runIf(runnable)('many jobs on one image', () => {
  it('each allocate their range', async () => {
    const path = scratchPath('jobs.raw');
    await makePattern(path, fine(4096));
    const content = await sha256(path);
    const image = await open(path);
    const jobs = Array.from({ length: 32 }, (_, i) => image.allocate({ offset: i * MiB, length: MiB }));
    for (const result of await Promise.all(jobs.map((job) => job.result))) {
      expect(result).toMatchObject({ verified: true });
    }
    await image.close();
    expect(await missing(path, 'falloc')).toEqual([]);
    expect(await sha256(path)).toBe(content);
  });

  it('that write zeros are done one at a time, or refused; none does harm', async () => {
    const path = scratchPath('writing.raw');
    await makePattern(path, fine(2048));
    const content = await sha256(path);
    const image = await open(path);
    const jobs = Array.from({ length: 8 }, (_, i) =>
      image.allocate({ offset: i * 2 * MiB, length: 2 * MiB, preallocation: 'full' }),
    );
    const ends = await Promise.all(jobs.map((job) => job.result.then(() => 'done', (e: ThickenError) => e.code)));
    for (const end of ends) expect(end).toMatch(/^(done|IN_USE)$/);
    // Nothing is in the way afterwards.
    expect(await image.allocate({ preallocation: 'full' }).result).toMatchObject({ verified: true });
    await image.close();
    expect(await missing(path, 'full')).toEqual([]);
    expect(await sha256(path)).toBe(content);
  });

  it('beside scans of it go on', async () => {
    const path = scratchPath('beside.raw');
    await makePattern(path, fine(8192));
    await using image = await open(path);
    const job = image.allocate({ speed: 32 * MiB });
    const verdicts = [];
    while (job.progress().position < 16 * MiB) verdicts.push(await image.verify());
    expect(verdicts.length).toBeGreaterThan(1);
    expect(verdicts.every(({ satisfied }) => !satisfied)).toBe(true);
    expect(await job.result).toMatchObject({ verified: true });
  });
});

const terminate = `
  import { Worker } from 'node:worker_threads';
  import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
  const [library, path, rounds] = process.argv.slice(1);
  const source = \`
    import { workerData, parentPort } from 'node:worker_threads';
    import(workerData.library).then(async ({ open }) => {
      parentPort.postMessage('ready');
      for (;;) {
        const image = await open(workerData.path);
        const { operation } = workerData;
        if (operation === 'extents') for await (const extent of image.extents());
        if (operation === 'pages') await Promise.all([1, 2, 3, 4, 5, 6].map(async () => {
          for await (const page of image.extentPages());
        }));
        if (operation === 'verify') await image.verify();
        if (operation === 'info') await image.info();
        if (operation === 'falloc') await image.allocate({ length: 2 ** 20 }).result;
        if (operation === 'full') await image.allocate({ preallocation: 'full', speed: 2 ** 25 }).result;
        await image.close();
      }
    });
  \`;
  const operations = ['extents', 'pages', 'verify', 'info', 'falloc', 'full'];
  const leaked = () => {
    const found = { reading: 0, writing: 0 };
    for (const number of readdirSync('/proc/self/fd')) {
      try {
        if (readlinkSync('/proc/self/fd/' + number) !== path) continue;
        const flags = parseInt(/flags:\\s*(\\d+)/.exec(readFileSync('/proc/self/fdinfo/' + number, 'utf8'))[1], 8);
        found[(flags & 3) === 0 ? 'reading' : 'writing']++;
      } catch (error) {
        // The descriptor that listed the folder is closed by now.
        if (error.code !== 'ENOENT') throw error;
      }
    }
    return found;
  };
  for (let i = 0; i < Number(rounds); i++) {
    const workerData = { library, path, operation: operations[i % operations.length] };
    const worker = new Worker(source, { eval: true, workerData });
    await new Promise((resolve, reject) => { worker.once('message', resolve); worker.once('error', reject); });
    await new Promise((resolve) => setTimeout(resolve, (i * 7) % 40));
    await worker.terminate();
  }
  const { open } = await import(library);
  const image = await open(path);
  const result = await image.allocate({ preallocation: 'full' }).result;
  await image.close();
  console.log(JSON.stringify({ ...leaked(), verified: result.verified }));
`;

describe.runIf(runnable)('a worker thread', () => {
  it(
    'can be terminated during any operation',
    async () => {
      const path = scratchPath('worker.raw');
      await makePattern(path, [...fine(8192), { kind: 'hole', length: 64 * MiB }]);
      const content = await sha256(path);
      const rounds = soak ? 300 : 50;
      const { stdout } = await script(terminate, [library, path, String(rounds)]);
      const { reading, writing, verified } = JSON.parse(stdout) as Record<'reading' | 'writing', number> & {
        verified: boolean;
      };
      expect(verified).toBe(true);
      expect(writing).toBe(0);
      // Node loses what an open in flight gives to a thread that is no more (Node 20, plain
      // fs.open too); all else is given back.
      expect(reading).toBeLessThan(Math.max(3, rounds / 10));
      expect(await sha256(path)).toBe(content);
      expect(await missing(path, 'full')).toEqual([]);
    },
    600_000,
  );

  it.runIf(withLoop)('that is terminated while it writes zeros leaves no lock', async () => {
    await using mounted = await mountFilesystem(EXT3);
    const path = makeSparse(`${mounted.path}/disk.raw`, 128 * MiB);
    await script(terminate, [library, path, '12']);
    expect(await allocate(path, '--preallocation', 'full')).toMatchObject({ allocated: 0, verified: true });
  });
});

const cycles = `
  import { readdirSync } from 'node:fs';
  const [library, path, count] = process.argv.slice(1);
  const { open } = await import(library);
  const cycle = async () => {
    const image = await open(path);
    let extents = 0;
    for await (const page of image.extentPages()) extents += page.state.length;
    await image.close();
    return extents;
  };
  const state = () => {
    gc(); gc();
    return { rss: process.memoryUsage().rss, fds: readdirSync('/proc/self/fd').length };
  };
  // As many as are measured: V8's young generation still grew after a third of them, once by 16 MiB, and
  // then no more in 30,000 cycles.
  for (let i = 0; i < Number(count); i++) await cycle();
  const before = state();
  let extents = 0;
  for (let i = 0; i < Number(count); i++) extents = await cycle();
  console.log(JSON.stringify({ before, after: state(), extents }));
`;

describe.runIf(runnable)('open, scan and close', () => {
  it(
    'leak neither memory nor descriptors',
    async () => {
      const path = scratchPath('cycles.raw');
      await makePattern(path, fine(2000));
      const { stdout } = await script(cycles, [library, path, String(soak ? 10_000 : 300)], ['--expose-gc']);
      type State = { rss: number; fds: number };
      const { before, after, extents } = JSON.parse(stdout) as { before: State; after: State; extents: number };
      expect(extents).toBe(4000);
      expect(after.fds).toBe(before.fds);
      expect(after.rss - before.rss).toBeLessThan(16 * MiB);
    },
    600_000,
  );
});

const ending = `
  const [library, path, level, how] = process.argv.slice(1);
  const { open } = await import(library);
  const image = await open(path);
  const job = image.allocate({ preallocation: level, speed: 2 ** 25 });
  job.once('progress', () => undefined);
  const timer = setInterval(() => {
    if (job.progress().position === 0) return;
    clearInterval(timer);
    console.log('moving');
    if (how === 'exit') process.exit(7);
    if (how === 'throw') throw new Error('the end');
    if (how === 'abort') process.abort();
  }, 1);
`;

describe.runIf(runnable)('a process', () => {
  const ends = [
    { how: 'exit', level: 'full', status: 7 },
    { how: 'exit', level: 'falloc', status: 7 },
    { how: 'throw', level: 'full', status: 1 },
    { how: 'abort', level: 'full', status: null },
  ];
  it.each(ends)('may end in the middle of an allocation ($how, $level)', async ({ how, level, status }) => {
    const path = scratchPath('ending.raw');
    await makePattern(path, [{ kind: 'data', length: MiB }, { kind: 'hole', length: 63 * MiB }]);
    const copy = scratchPath('copy.raw');
    await run('cp', ['--sparse=always', path, copy]);
    const args = ['--input-type=module', '-e', ending, library, path, level, how];
    // An abort need not leave a core behind.
    await using spawned = start('sh', ['-c', 'ulimit -c 0; exec "$0" "$@"', process.execPath, ...args]);
    await spawned.output('stdout', /moving/);
    const began = performance.now();
    const outcome = await spawned.exit;
    if (soak) expect(performance.now() - began).toBeLessThan(1500);
    expect(outcome.status, outcome.stderr).toBe(status);
    expect(outcome.signal).toBe(how === 'abort' ? 'SIGABRT' : null);
    expect(await qemuCompare(path, copy)).toBe(true);
    expect(await hostBytes(path)).toBeLessThan(64 * MiB);
    expect(await allocate(path, '--preallocation', level)).toMatchObject({ verified: true });
    expect(await qemuCompare(path, copy)).toBe(true);
  });

  it('ends by itself once the job is done, without a close', async () => {
    const path = makeSparse(scratchPath('natural.raw'), MiB);
    const source = `
      const { open } = await import(process.argv[1]);
      const image = await open(process.argv[2]);
      console.log((await image.allocate().result).verified);
    `;
    expect((await script(source, [library, path])).stdout).toBe('true\n');
  });

  it('is not ended by a result that nobody awaits', async () => {
    const path = makeSparse(scratchPath('unawaited.raw'), MiB);
    const source = `
      const { open } = await import(process.argv[1]);
      const image = await open(process.argv[2]);
      image.allocate({ offset: -1 });
      await new Promise((resolve) => setTimeout(resolve, 100));
      console.log('alive');
    `;
    expect((await script(source, [library, path])).stdout).toBe('alive\n');
  });
});
