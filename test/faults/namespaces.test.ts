/** Thickens at one QEMU that do not see each other's processes. */
import { readlinkSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { ownName } from '../../lib/qemu/owner.js';
import { cliMain, mustRun, repository, start, type Spawned } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import {
  allocateArgs,
  expectClean,
  expectFailure,
  expectPopulated,
  leftovers,
  makeDisk,
  makeTemplate,
  mustAllocate,
  startAllocate,
  startHost,
  timely,
  TOOLS,
  underway,
  type Host,
} from './rig.js';

const runnable = requires({ root: true, tools: [...TOOLS, 'unshare'] });
const inFirst = readlinkSync('/proc/self/ns/pid') === 'pid:[4026531836]';

/** A slow run in a namespace of its own, where no process of ours is seen. */
function startApart(host: Host): Spawned {
  const args = allocateArgs(host.monitors[0], 'disk0', '--json', '--progress', 'json', '--speed', '8M', '--preallocation', 'metadata');
  const apart = ['--pid', '--fork', '--mount-proc', '--kill-child', process.execPath, cliMain];
  return start('unshare', [...apart, ...args], { env: host.env });
}

describe.runIf(runnable)('a run in another namespace of process ids', () => {
  it('keeps its export and its server when one out here looks at the same QEMU', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const apart = startApart(host);
    await underway(apart);
    const before = await leftovers(host);
    await expectFailure(startAllocate(host, { monitor: host.monitors[1] }), ['NBD_BUSY']);
    expect(await leftovers(host)).toEqual(before);
    const outcome = await timely(apart);
    expect(outcome.status, outcome.stdout).toBe(0);
    await expectClean(host);
    await expectPopulated(host, disk);
  });

  // From within a container nobody can tell.
  if (inFirst) {
    it('that has ended with all in it leaves what the next run removes', async () => {
      const disk = await makeDisk(await makeTemplate());
      await using host = await startHost({ disks: [disk.overlay] });
      const apart = startApart(host);
      await underway(apart);
      apart.kill('SIGKILL');
      await apart.exit;
      expect(await leftovers(host)).toHaveLength(2);
      await mustAllocate(host);
      await expectClean(host);
    });
  }
});

const hides = requires({ root: true, tools: ['unshare', 'mount', 'setpriv'] });

describe('a name of what was added to a QEMU', () => {
  // Of a user to whom no other's processes are shown.
  it.runIf(hides).each([1, 2])('is that of a thicken that lives, though it is hidden: hidepid=%i', async (hidepid) => {
    const judge = `
      import { isAbandoned } from ${JSON.stringify(join(repository, 'build-modules/qemu/owner.js'))};
      console.log(process.argv.slice(1).map(isAbandoned).join());`;
    const hidden = `mount -t proc -o hidepid=${hidepid} proc /proc && exec setpriv --reuid nobody --regid nogroup --clear-groups "$@"`;
    const ended = start('true', []);
    await ended.exit;
    const names = [ownName(), ownName().replace(/^thicken-\d+/, `thicken-${ended.pid}`)];
    const node = [process.execPath, '--input-type=module', '-e', judge, ...names];
    expect((await mustRun('unshare', ['--mount', 'sh', '-c', hidden, 'sh', ...node])).trim()).toBe('false,true');
  });

  it('is of this process, this namespace and this start of the machine', () => {
    const [, pid, place] = /^thicken-(\d+)-\d+-([0-9a-f]{14})-[0-9a-f]{8}$/.exec(ownName()) ?? [];
    expect(Number(pid)).toBe(process.pid);
    const [, inode] = /(\d+)/.exec(readlinkSync('/proc/self/ns/pid')) ?? [];
    expect(parseInt(place!.slice(6), 16)).toBe(Number(inode));
  });
});
