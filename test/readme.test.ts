import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { chmod, mkdir } from 'node:fs/promises';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { listJobs, QmpClient } from '../lib/index.js';
import { nbdkit } from './nbd/servers.js';
import { daemonWith } from './qmp/streams.js';
import { attachLoop } from './support/loop.js';
import { makePattern, type Segment } from './support/patterns.js';
import { cliMain, mustRun, repository, run, start, startQemu } from './support/processes.js';
import { untilTimed } from './support/qemu-io.js';
import { requires } from './support/requirements.js';
import { scratchPath } from './support/scratch.js';
import { waitFor } from './support/wait.js';

const MIB = 2 ** 20;
const readme = readFileSync(join(repository, 'README.md'), 'utf8');

/** Some data, some holes; large enough for every range that README names. */
const SEGMENTS: Segment[] = [
  { kind: 'hole', length: 8 * MIB },
  { kind: 'data', length: 8 * MIB },
  { kind: 'unwritten', length: 4 * MIB },
  { kind: 'hole', length: 1100 * MIB },
];

function blocks(language: string): string[] {
  const found = readme.matchAll(new RegExp(`^\`\`\`${language}\\n([\\s\\S]*?)^\`\`\``, 'gm'));
  return [...found].map((match) => match[1] ?? '');
}

async function workplace(): Promise<{ folder: string; path: string }> {
  const folder = scratchPath('readme');
  await mkdir(join(folder, 'bin'), { recursive: true });
  const command = join(folder, 'bin/thicken');
  writeFileSync(command, `#!/bin/sh\nexec ${process.execPath} ${cliMain} "$@"\n`);
  await chmod(command, 0o755);
  return { folder, path: `${join(folder, 'bin')}:${process.env['PATH']}` };
}

async function freshImages(folder: string): Promise<void> {
  for (const name of ['disk.img', 'one.img', 'two.img']) {
    await makePattern(join(folder, name), SEGMENTS);
  }
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', join(folder, 'disk.qcow2'), '128M']);
  await mustRun('qemu-img', ['create', '-q', '-f', 'vdi', join(folder, 'disk.vdi'), '64M']);
}

const MONITOR = '/run/guest.qmp';
const every = blocks('sh').flatMap((block) => block.trim().split('\n'));
const live = every.filter((command) => / --device disk0|^thicken info --qmp/.test(command));
const steering = every.filter((command) => command.includes(MONITOR) && !live.includes(command));
const SERVED = '/run/disk.sock';
const served = every.filter((command) => command.startsWith('thicken') && command.includes(SERVED));
const TEMPLATE = '/run/template.sock';
const template = blocks('sh').find((block) => block.includes(TEMPLATE))?.trim().split('\n') ?? [];
const encrypted = blocks('sh').find((block) => block.includes('passphrase'))?.trim().split('\n') ?? [];
const rows = [...template, ...encrypted];
const commands = every.filter(
  (command) => ![MONITOR, SERVED].some((socket) => command.includes(socket)) && !rows.includes(command),
);
const withQemu = requires({ tools: ['qemu-img', 'qemu-storage-daemon'] });
const withMachine = requires({ tools: ['qemu-img', 'qemu-system-x86_64'] });

test('README shows commands at all', () => {
  expect(commands.length).toBeGreaterThan(10);
  expect(steering.length).toBeGreaterThan(5);
  expect(live.length).toBeGreaterThan(5);
  expect(served.length).toBeGreaterThan(4);
});

test.runIf(requires({ root: true, loop: true, tools: ['qemu-img'] })).each(commands)('%s', async (command) => {
  const { folder, path } = await workplace();
  await freshImages(folder);
  // The run with --speed is shortened to what can be waited for: the range, not the rate.
  const shortened = command.replace('--speed 50M', '--speed 50M --length 32M');
  const outcome = await inShell(shortened, folder, path);
  // `verify` of a thin image is not satisfied, which is what it is for.
  const accepted = command.includes('verify') ? [0, 3] : [0];
  expect(accepted, outcome.stderr).toContain(outcome.status);
});

/** The device of the examples is a loop device here. */
async function inShell(command: string, folder: string, path: string) {
  const options = { cwd: folder, env: { PATH: path } };
  if (!command.includes('/dev/vg0/guest')) return run('sh', ['-c', command], options);
  await using loop = await attachLoop({ file: join(folder, 'disk.img') });
  return await run('sh', ['-c', command.replace('/dev/vg0/guest', loop.device)], options);
}

/** The monitor of the examples is a storage daemon's here, with a job by that name. */
test.runIf(withQemu).each(steering)('%s', async (command) => {
  const { folder, path } = await workplace();
  await using qemu = await daemonWith('stream0');
  const outcome = await inShell(command.replace(MONITOR, qemu.qmp), folder, path);
  expect([outcome.status, outcome.stderr]).toEqual([0, '']);
  expect(outcome.stdout).toContain('stream0');
});

/** The export of the examples is a nbdkit's here; by SSH it is in test/nbd/remote.test.ts. */
test.runIf(requires({ tools: ['nbdkit'] })).each(served)('%s', async (command) => {
  const { folder, path } = await workplace();
  await using server = await nbdkit(['memory', '64M']);
  const outcome = await inShell(command.replace(SERVED, server.socketPath), folder, path);
  expect(outcome.status, outcome.stderr).toBe(0);
  expect(outcome.stdout.length).toBeGreaterThan(20);
});

/** In a row: each needs what the one before it made. The server is ended by its own command line's file. */
test.runIf(requires({ tools: ['nbdkit', 'qemu-img', 'qemu-storage-daemon'] }))('the disk made of a template', async () => {
  const { folder, path } = await workplace();
  await makePattern(join(folder, 'template.raw'), [{ kind: 'data', length: 8 * MIB }, { kind: 'hole', length: 8 * MIB }]);
  const [server, ...rest] = template.map((command) => command.replace(TEMPLATE, join(folder, 's')));
  await using nbd = start('sh', ['-c', server!.replace('nbdkit', 'exec nbdkit -f')], { cwd: folder });
  await waitFor('the server', () => existsSync(join(folder, 's')));
  expect(rest).toHaveLength(2);
  for (const command of rest) {
    const outcome = await inShell(command, folder, path);
    expect(outcome.status, outcome.stderr).toBe(0);
  }
  await nbd.dispose();
  const same = await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', 'template.raw', 'disk.qcow2'], { cwd: folder });
  expect(same.status, same.stderr).toBe(0);
});

/** In a row, too. */
test.runIf(requires({ tools: ['qemu-img', 'qemu-storage-daemon'] }))('the encrypted disk', async () => {
  const { folder, path } = await workplace();
  await makePattern(join(folder, 'template.raw'), [{ kind: 'data', length: 8 * MIB }, { kind: 'hole', length: 8 * MIB }]);
  writeFileSync(join(folder, 'passphrase'), 'a passphrase\n');
  const [make, ...rest] = encrypted;
  expect(rest).toHaveLength(3);
  await untilTimed(() => inShell(make!, folder, path));
  for (const command of rest) {
    const outcome = await inShell(command, folder, path);
    expect(outcome.status, outcome.stderr).toBe(0);
  }
  const image = 'driver=qcow2,encrypt.key-secret=key,file.filename=private.qcow2';
  const compare = ['compare', '--object', 'secret,id=key,file=passphrase', '--image-opts', image, 'driver=raw,file.filename=template.raw'];
  const same = await run('qemu-img', compare, { cwd: folder });
  expect(same.status, same.stderr).toBe(0);
});

/** A machine that has not been started, with a disk by that name over a template. */
async function machine(folder: string) {
  const [base, overlay] = [join(folder, 'base.raw'), join(folder, 'disk.qcow2')];
  await makePattern(base, [{ kind: 'data', length: 16 * MIB }, { kind: 'hole', length: 48 * MIB }]);
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'raw', overlay]);
  return startQemu({ kind: 'guest', file: overlay, format: 'qcow2' });
}

test.runIf(withMachine).each(live)('%s', async (command) => {
  const { folder, path } = await workplace();
  await using qemu = await machine(folder);
  const outcome = await inShell(command.replace(MONITOR, qemu.qmp), folder, path);
  const accepted = command.includes('verify') ? [0, 3] : [0];
  expect(accepted, outcome.stderr).toContain(outcome.status);
  expect(outcome.stdout.length).toBeGreaterThan(20);
});

test.runIf(withMachine)('the TypeScript example for a guest’s disk runs, and allocates', async () => {
  const { folder } = await workplace();
  await using qemu = await machine(folder);
  const output = await runScript(example('open as openDisk').replace(MONITOR, qemu.qmp));
  expect(output).toBe(`${64 * MIB} true\n`);
});

/** The TypeScript example that imports `name`. */
function example(name: string): string {
  const found = blocks('ts').filter((block) => new RegExp(`^import .*\\b${name}`).test(block));
  expect(found).toHaveLength(1);
  return found[0] ?? '';
}

/** Inside the clone, so that the package finds itself by name. */
function runScript(script: string): Promise<string> {
  return mustRun(process.execPath, ['--input-type=module', '-e', script], { cwd: repository });
}

test.runIf(withQemu)('the TypeScript example for jobs runs, and steers', async () => {
  await using qemu = await daemonWith('stream0');
  // Else it might have reached its end before it is looked at.
  await mustRun(process.execPath, [cliMain, 'pause', '--qmp', qemu.qmp]);
  const output = await runScript(example('listJobs').replace(MONITOR, qemu.qmp));
  expect(output).toMatch(/^stream0 (?:running|paused) \d+ \d+ (null|[\d.]+)\n$/);
  await using client = await QmpClient.connect(qemu.qmp);
  expect(await listJobs(client)).toMatchObject([{ id: 'stream0', speed: 50 * MIB }]);
});

test('the TypeScript example runs, and allocates', async () => {
  const { folder } = await workplace();
  await freshImages(folder);
  const output = await runScript(`process.chdir(${JSON.stringify(folder)});\n${example('open }')}`);
  expect(output).toMatch(/0 1048576 hole/);
  expect(output).toMatch(/true true\n$/);
});

test('files that README links to exist', () => {
  const links = [...readme.matchAll(/\]\(([^)#:]+)\)/g)].map((match) => match[1] ?? '');
  expect(links.length).toBeGreaterThan(4);
  for (const link of links) expect(existsSync(join(repository, link)), link).toBe(true);
});

test('the npm scripts that README and CONTRIBUTING name exist', () => {
  const { scripts } = JSON.parse(readFileSync(join(repository, 'package.json'), 'utf8')) as {
    scripts: Record<string, string>;
  };
  const text = readme + readFileSync(join(repository, 'CONTRIBUTING.md'), 'utf8');
  const named = [...text.matchAll(/npm (?:run )?(demo|test|soak|build|bench|lint|thicken|prebuilds)\b/g)];
  for (const match of named) expect(scripts).toHaveProperty(match[1] ?? '');
});
