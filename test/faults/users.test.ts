import { chmodSync, chownSync, existsSync, lstatSync, mkdirSync, readdirSync, readFileSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { ownName } from '../../lib/qemu/owner.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import {
  expectClean,
  expectPopulated,
  leftovers,
  makeDisk,
  makeTemplate,
  mustAllocate,
  ROUTES,
  startAllocate,
  startHost,
  TOOLS,
  underway,
  type Host,
} from './rig.js';

const runnable = requires({ tools: TOOLS });
const asRoot = requires({ root: true, tools: [...TOOLS, 'setpriv'] });
const NOBODY = 65534;

/** Of the folder and the socket while a run is at work; the folder's owner. */
async function rightsDuring(host: Host, route: 'populate' | 'stream') {
  const spawned = startAllocate(host, { route, speed: '12M' });
  await underway(spawned);
  const [name] = readdirSync(host.temp);
  const folder = join(host.temp, name!);
  const facts = statSync(folder);
  const socket = statSync(join(folder, 'nbd.sock'));
  expect((await spawned.exit).status, spawned.stdout()).toBe(0);
  return { owner: facts.uid, folder: facts.mode & 0o7777, socket: socket.mode & 0o7777 };
}

describe.runIf(runnable).each(ROUTES)('the files of a run of %s', (route) => {
  it('are for nobody else', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    expect(await rightsDuring(host, route)).toEqual({ owner: process.getuid!(), folder: 0o700, socket: 0o600 });
    await expectClean(host);
  });
});

describe.runIf(asRoot).each([
  ['started as another user', { by: ['setpriv', '--reuid', 'nobody', '--regid', 'nogroup', '--clear-groups'] }],
  ['that becomes another user', { args: ['-runas', 'nobody'] }],
])('a QEMU %s', (_, how) => {
  it('that a killed run was at: the next one finds what is left', async () => {
    const template = await makeTemplate();
    const disk = await makeDisk(template);
    chmodSync(dirname(disk.overlay), 0o777);
    chmodSync(template, 0o644);
    chownSync(disk.overlay, NOBODY, NOBODY);
    await using host = await startHost({ disks: [disk.overlay], ...how });
    const killed = startAllocate(host, { speed: '2M' });
    await underway(killed);
    killed.kill('SIGKILL');
    await killed.exit;
    expect(await leftovers(host)).toHaveLength(2);
    await mustAllocate(host);
    await expectClean(host);
  });

  it.each(ROUTES)('is had to %s by root', async (route) => {
    const template = await makeTemplate();
    const disk = await makeDisk(template);
    const folder = dirname(disk.overlay);
    chmodSync(folder, 0o777);
    chmodSync(template, 0o644);
    chownSync(disk.overlay, NOBODY, NOBODY);
    await using host = await startHost({ disks: [disk.overlay], temp: scratchPath('temp'), ...how });
    expect(readFileSync(`/proc/${host.pid}/status`, 'utf8')).toMatch(/^Uid:\t65534\t65534/m);
    expect(await rightsDuring(host, route)).toEqual({ owner: NOBODY, folder: 0o700, socket: 0o600 });
    await expectClean(host);
    await expectPopulated(host, disk, { alone: route === 'stream' });
  });
});

describe.runIf(runnable)('what others put where a killed run’s files might be', () => {
  it('is not removed beyond an own socket, nor followed', async () => {
    const disk = await makeDisk(await makeTemplate());
    await using host = await startHost({ disks: [disk.overlay] });
    const victim = scratchPath('victim');
    mkdirSync(victim);
    writeFileSync(join(victim, 'precious'), 'x');
    writeFileSync(join(victim, 'nbd.sock'), 'x');
    const names = [1, 2].map((i) => join(host.temp, `${ownName().replace(/^thicken-\d+-\d+/, 'thicken-1-1')}-${i}`));
    symlinkSync(victim, names[0]!);
    mkdirSync(names[1]!);
    writeFileSync(join(names[1]!, 'precious'), 'x');
    symlinkSync(victim, join(names[1]!, 'nbd.sock'));
    await mustAllocate(host);
    expect(readdirSync(victim).sort()).toEqual(['nbd.sock', 'precious']);
    const left = readdirSync(host.temp).map((name) => join(host.temp, name));
    expect(left.some((path) => existsSync(join(path, 'precious')) && !lstatSync(path).isSymbolicLink())).toBe(true);
    for (const path of left) rmSync(path, { recursive: true });
    expect(await leftovers(host)).toEqual([]);
  });
});
