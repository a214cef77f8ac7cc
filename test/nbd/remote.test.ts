/** A disk on another machine, through nbdkit and SSH: the commands of README, with a real sshd. */
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { missing } from '../storage/helpers.js';
import { freePort } from '../support/ports.js';
import { mustRun, repository, start, type Spawned } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import { nbdkit } from './servers.js';
import { allocateExport, expectSame, imageOf, SIZE } from './targets.js';

const tools = ['nbdkit', 'nbdinfo', 'sshd', 'ssh-keygen', 'qemu-img', 'filefrag', 'cp', 'sync'];

interface Ssh {
  process: Spawned;
  /** Parameters of nbdkit's for that server. */
  parameters: string[];
}

/** A sshd for root alone, with keys of its own; nothing of the machine's is used or changed. */
async function sshServer(): Promise<Ssh> {
  const folder = scratchPath('ssh');
  mkdirSync(folder);
  const file = (name: string) => join(folder, name);
  for (const name of ['host', 'user']) await mustRun('ssh-keygen', ['-q', '-t', 'ed25519', '-N', '', '-f', file(name)]);
  const port = await freePort();
  const config = [
    `Port ${port}`, 'ListenAddress 127.0.0.1', `HostKey ${file('host')}`, `PidFile ${file('pid')}`,
    `AuthorizedKeysFile ${file('user.pub')}`, 'StrictModes no', 'PermitRootLogin yes', 'UsePAM no',
    'PasswordAuthentication no', 'Subsystem sftp internal-sftp', '',
  ];
  writeFileSync(file('config'), config.join('\n'));
  writeFileSync(file('known'), `[127.0.0.1]:${port} ${readFileSync(file('host.pub'), 'utf8')}`);
  mkdirSync('/run/sshd', { recursive: true });
  const process = start('/usr/sbin/sshd', ['-D', '-e', '-f', file('config')]);
  await waitFor('sshd', () => /Server listening/.test(process.stderr()) || ended(process));
  const identity = [`identity=${file('user')}`, `known-hosts=${file('known')}`];
  return { process, parameters: ['host=127.0.0.1', `port=${port}`, 'user=root', ...identity] };
}

function ended({ child, stderr }: Spawned): false {
  if (child.exitCode !== null) throw new Error(`sshd ended: ${stderr()}`);
  return false;
}

/** The command of README's that begins so, in words. */
function command(beginning: string): string[] {
  const readme = readFileSync(join(repository, 'README.md'), 'utf8');
  const lines = readme.split('\n').filter((line) => line.startsWith(beginning));
  expect(lines).toHaveLength(1);
  return lines[0]!.slice(beginning.length).trim().split(' ');
}

describe.runIf(requires({ root: true, tools }))('a raw image that nbdkit reaches by SSH', () => {
  test('is allocated as README says', async () => {
    const { path, copy } = await imageOf('raw');
    const ssh = await sshServer();
    const asked = command('nbdkit --unix /run/disk.sock');
    const parameters = asked.flatMap((word) => {
      if (word === 'host=storage.example') return ssh.parameters;
      return word === '/images/disk.img' ? [path] : [word];
    });
    expect(parameters.length).toBeGreaterThan(asked.length);
    await using server = await nbdkit(parameters);
    const [route, name] = command("thicken allocate --exclusive --route").slice(0, 2);
    expect(name).toBe("'nbd+unix:///?socket=/run/disk.sock'");
    const result = await allocateExport(server.uri, '--route', route!);
    expect(result).toMatchObject({ effective: { offset: 0, length: SIZE }, verified: null });
    await server[Symbol.asyncDispose]();
    await ssh.process.dispose();
    expect(await missing(path, 'full')).toEqual([]);
    await expectSame(path, 'raw', copy);
  });
});
