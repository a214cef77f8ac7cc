import { existsSync } from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { describe, expect, it } from 'vitest';
import { serveFile } from '../nbd/servers.js';
import { freePort } from '../support/ports.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';
import {
  expectFailure,
  expectIntact,
  expectPopulated,
  isPopulated,
  leftovers,
  makeDisk,
  makeTemplate,
  MiB,
  mustAllocate,
  ROUTES,
  startAllocate,
  startHost,
  TOOLS,
  underway,
  type Host,
} from './rig.js';

const runnable = requires({ tools: TOOLS });

interface Served {
  uri: string;
  /** Whether the server and the user's own export are as they were. */
  expectUntouched(): Promise<void>;
}

/** A server of the user's, with an export of the user's, both in QEMU. */
async function serve(host: Host, kind: 'unix' | 'tcp'): Promise<Served> {
  const path = scratchPath('user-nbd');
  const port = await freePort();
  const addr =
    kind === 'unix' ? { type: 'unix', data: { path } } : { type: 'inet', data: { host: '127.0.0.1', port: String(port) } };
  await host.ask('nbd-server-start', { addr });
  await host.ask('block-export-add', { type: 'nbd', id: 'theirs', 'node-name': 'node0', name: 'theirs' });
  const uri = kind === 'unix' ? `nbd+unix:///?socket=${path}` : `nbd://127.0.0.1:${port}`;
  return {
    uri,
    expectUntouched: async () => {
      expect(await leftovers(host)).toEqual([]);
      const { NbdClient } = await import('../../lib/nbd/client.js');
      await using nbd = await NbdClient.connect(uri, { exportName: 'theirs' });
      expect(nbd.size).toBe(24 * MiB);
    },
  };
}

describe.runIf(runnable).each(['unix', 'tcp'] as const)('an NBD server that runs already (%s)', (kind) => {
  it('is not used without --nbd', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const { expectUntouched } = await serve(host, kind);
    const outcome = await startAllocate(host).exit;
    expect(outcome.status).toBe(1);
    expect(JSON.parse(outcome.stdout).error).toMatchObject({ code: 'NBD_BUSY', message: expect.stringMatching(/--nbd URI/) });
    await expectUntouched();
    await host.quit();
    await expectIntact(disk);
  });

  it.each(ROUTES)('gets an export of ours for %s, and is never stopped', async (route) => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const { uri, expectUntouched } = await serve(host, kind);
    const spawned = startAllocate(host, { route, speed: '12M', more: ['--nbd', uri] });
    await underway(spawned);
    const exports = (await host.ask('query-block-exports')) as { id: string }[];
    expect(exports.map(({ id }) => id.replace(/-.*/, '')).sort()).toEqual(['theirs', 'thicken']);
    expect((await spawned.exit).status).toBe(0);
    await expectUntouched();
    await expectPopulated(host, disk, { alone: route === 'stream' });
  });

  it('is kept where a run with --nbd is killed; the next one removes its export alone', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const { uri, expectUntouched } = await serve(host, kind);
    const spawned = startAllocate(host, { speed: '4M', more: ['--nbd', uri] });
    await underway(spawned);
    spawned.kill('SIGKILL');
    await spawned.exit;
    expect(await leftovers(host)).toHaveLength(1);
    await mustAllocate(host, { more: ['--nbd', uri] });
    await expectUntouched();
    await expectPopulated(host, disk);
  });

  it('lets two runs on two disks work at once', async () => {
    const template = await makeTemplate();
    const disks = [await makeDisk(template), await makeDisk(template)];
    await using host = await startHost({ disks: disks.map(({ overlay }) => overlay) });
    const { uri, expectUntouched } = await serve(host, kind);
    const runs = disks.map((_, n) =>
      startAllocate(host, { speed: '12M', device: `disk${n}`, monitor: host.monitors[n]!, more: ['--nbd', uri] }),
    );
    for (const run of runs) expect((await run.exit).status, run.stdout()).toBe(0);
    await expectUntouched();
    await host.quit();
    for (const disk of disks) {
      expect(await isPopulated(disk.overlay)).toBe(true);
      await expectIntact(disk);
    }
  });
});

describe.runIf(runnable)('a wrong --nbd', () => {
  it.each([
    ['another QEMU’s server', 'other', /does not serve this QEMU’s disk/],
    ['a server that has every name', 'nbdkit', /does not serve this QEMU’s disk/],
    ['an address where nothing listens', 'nothing', /nbd/],
    ['an address where something else listens', 'silent', /nbd/i],
    ['no URI', 'nonsense', /no NBD URI/],
  ])('%s: told as such, and nothing is left behind', async (_, kind, words) => {
    const template = await makeTemplate();
    const disk = await makeDisk(template);
    await using host = await startHost({ disks: [disk.overlay] });
    const { expectUntouched } = await serve(host, 'unix');
    await using stranger = await startHost({ disks: [(await makeDisk(template)).overlay] });
    await using nbdkit = await serveFile(template);
    const silent = createServer((socket) => socket.end('SSH-2.0-OpenSSH_9.2p1\r\n')).listen(0, '127.0.0.1');
    await waitFor('a port', () => silent.listening);
    const uris: Record<string, string> = {
      other: kind === 'other' ? (await serve(stranger, 'unix')).uri : '',
      nbdkit: nbdkit.uri,
      nothing: `nbd://127.0.0.1:${await freePort()}`,
      silent: `nbd://127.0.0.1:${(silent.address() as AddressInfo).port}`,
      nonsense: 'http://example.invalid/',
    };
    try {
      const spawned = startAllocate(host, { more: ['--nbd', uris[kind]!] });
      const codes = ['NBD_BUSY', 'NBD_LOST', 'NBD_PROTOCOL', 'ECONNREFUSED', 'USAGE'];
      const { error } = await expectFailure(spawned, codes, kind === 'nonsense' ? 2 : 1);
      expect(error.message).toMatch(words);
    } finally {
      silent.close();
    }
    await expectUntouched();
  });

  it('where no server runs at all: told as such', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const path = scratchPath('nobody');
    const spawned = startAllocate(host, { more: ['--nbd', `nbd+unix:///?socket=${path}`] });
    const { error } = await expectFailure(spawned, ['NBD_BUSY']);
    expect(error.message).toMatch(/no NBD server runs/);
    expect(existsSync(path)).toBe(false);
    expect(await leftovers(host)).toEqual([]);
  });
});
