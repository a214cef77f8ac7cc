/** QEMUs that have an NBD server already, and storage daemons. */
import { describe, expect, it } from 'vitest';
import type { ImageInfo } from '../../lib/types.js';
import { storageDaemon } from '../nbd/servers.js';
import { makeTemplate } from '../support/guest-content.js';
import { mustRun, startQemu } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import {
  allocate,
  allocateAny,
  atMonitor,
  cliJson,
  copyOf,
  diskArgs,
  expectAlone,
  MiB,
  overlayOf,
  ownRanges,
  startMachine,
  withQemu,
  type Machine,
  type Refusal,
} from './helpers.js';

const tools = requires({ tools: ['nbdinfo', 'qemu-storage-daemon'] });
const SIZE = 8 * MiB;

async function overlay(): Promise<string> {
  const template = scratchPath('template.raw');
  makeTemplate(template, { size: SIZE, seed: 13 });
  return overlayOf(template);
}

/** Somebody's own server in the QEMU, with an export of his. */
async function serve(machine: Machine): Promise<string> {
  const path = scratchPath('nbd');
  await atMonitor(machine.qmp, async (client) => {
    await client.executeAny('nbd-server-start', { addr: { type: 'unix', data: { path } }, 'max-connections': 4 });
    await client.execute('block-export-add', { type: 'nbd', id: 'his', 'node-name': 'disk', name: 'his' });
  });
  return path;
}

describe.runIf(withQemu && tools)('a QEMU whose NBD server runs already', () => {
  it('is used by its address, and left running', async () => {
    const file = await overlay();
    const before = await copyOf(file, 'qcow2');
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    const path = await serve(machine);
    const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk');
    expect(document.error).toMatchObject({ code: 'NBD_BUSY' });
    expect(status).toBe(1);
    const uri = `nbd+unix:///?socket=${path}`;
    const result = await allocate(machine.qmp, 'disk', '--nbd', uri);
    expect(result).toMatchObject({ allocated: SIZE, verified: true });
    expect(await mustRun('nbdinfo', ['--size', `nbd+unix:///his?socket=${path}`])).toBe(`${SIZE}\n`);
    await atMonitor(machine.qmp, async (client) => {
      expect((await client.execute('query-block-exports')).map(({ id }) => id)).toEqual(['his']);
      await client.executeAny('nbd-server-stop');
    });
    await machine.quit();
    await expectAlone(file, 'qcow2', before);
  });

  it('is not taken for another one', async () => {
    const file = await overlay();
    await using machine = await startMachine(diskArgs('disk', 'qcow2', file));
    await serve(machine);
    await using other = await storageDaemon(await overlay(), 'qcow2');
    const uri = `nbd+unix:///?socket=${other.socketPath}`;
    const { status, document } = await allocateAny<Refusal>(machine.qmp, 'disk', '--nbd', uri);
    expect(document.error).toMatchObject({ code: 'NBD_BUSY' });
    expect(status).toBe(1);
    await atMonitor(machine.qmp, async (client) => {
      expect((await client.execute('query-block-exports')).map(({ id }) => id)).toEqual(['his']);
      await client.executeAny('nbd-server-stop');
    });
    await machine.quit();
    expect(await ownRanges(file, 'qcow2')).toEqual([]);
  });
});

describe.runIf(withQemu && tools)('a storage daemon', () => {
  it('has its disks populated, too', async () => {
    const file = await overlay();
    const before = await copyOf(file, 'qcow2');
    await using daemon = await startQemu({ file, format: 'qcow2', kind: 'daemon' });
    const { document } = await cliJson<{ device: string }[]>(['info', '--qmp', daemon.qmp]);
    expect(document.map(({ device }) => device)).toEqual(['disk']);
    const uri = daemon.nbd!.replace('/disk?', '/?');
    expect(await allocate(daemon.qmp, 'disk', '--nbd', uri)).toMatchObject({ allocated: SIZE, verified: true });
    const info = await cliJson<ImageInfo>(['info', '--qmp', daemon.qmp, '--device', 'disk', '--nbd', uri]);
    expect(info.document).toMatchObject({ missing: 0, allocated: SIZE });
    await atMonitor(daemon.qmp, (client) => client.executeAny('quit'));
    await daemon[Symbol.asyncDispose]();
    expect(await ownRanges(file, 'qcow2')).toEqual([[0, SIZE]]);
    await expectAlone(file, 'qcow2', before);
  });
});
