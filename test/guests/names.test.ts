/** Disks by every name that a user has for them. */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { AllocationResult, ImageInfo } from '../../lib/types.js';
import { makeTemplate } from '../support/guest-content.js';
import { cli } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';
import {
  cliJson,
  diskArgs,
  KiB,
  MiB,
  overlayOf,
  startMachine,
  withQemu,
  type Machine,
  type Refusal,
} from './helpers.js';

const SIZE = 4 * MiB;

async function overlay(seed: number): Promise<string> {
  const template = scratchPath('template.raw');
  makeTemplate(template, { size: SIZE, seed });
  return overlayOf(template);
}

interface Disk {
  device: string;
  names: string[];
  node: string;
  format: string;
  virtualSize: number;
  readOnly: boolean;
  backing: object[];
  file: string;
}

describe.runIf(withQemu)('a disk of a QEMU', () => {
  let machine: Machine;
  let files: string[];

  beforeAll(async () => {
    files = await Promise.all([1, 2, 3, 4].map(overlay));
    const throttled = { driver: 'throttle', 'node-name': 'limited', 'throttle-group': 'group', file: 'inner' };
    machine = await startMachine([
      ...diskArgs('one', 'qcow2', files[0]!),
      ...['-drive', `if=none,id=two,file=${files[1]},format=qcow2`],
      ...['-device', 'virtio-blk-pci,drive=two'],
      ...['-object', 'throttle-group,id=group'],
      ...['-blockdev', JSON.stringify({ driver: 'qcow2', 'node-name': 'inner', file: { driver: 'file', filename: files[2] } })],
      ...['-blockdev', JSON.stringify(throttled), '-device', 'virtio-scsi-pci,id=scsi0'],
      ...['-device', 'scsi-hd,id=three,drive=limited,bus=scsi0.0'],
      ...['-drive', `if=ide,file=${files[3]},format=qcow2,readonly=off`],
      ...['-device', 'ide-cd,id=drawer'],
    ]);
  });
  afterAll(async () => {
    await machine.quit();
    await machine[Symbol.asyncDispose]();
  });

  const info = (device: string) => cliJson<ImageInfo>(['info', '--qmp', machine.qmp, '--device', device]);

  it.each([
    ['the id of its device', 'dev-one', 0],
    ['its node', 'one', 0],
    ['its path in QOM', '/machine/peripheral/dev-one', 0],
    ['the path of its backend in QOM', '/machine/peripheral/dev-one/virtio-backend', 0],
    ['its drive', 'two', 1],
    ['the id of a SCSI disk', 'three', 2],
    ['the filter above it', 'limited', 2],
    ['its node below a filter', 'inner', 2],
    ['the drive of an old machine', 'ide0-hd0', 3],
  ])('is found by %s', async (_what, name, index) => {
    const { status, stderr, document } = await info(name);
    expect(status, stderr).toBe(0);
    expect(document).toMatchObject({
      target: `${machine.qmp}#${name}`,
      kind: 'qemu',
      format: 'qcow2',
      virtualSize: SIZE,
      missing: SIZE,
      granularity: 64 * KiB,
      inUse: { by: `QEMU (pid ${machine.pid})` },
      backing: [{ format: 'raw', virtualSize: SIZE }],
    });
    expect(document.allocated).toBe(0);
    const { document: disks } = await cliJson<Disk[]>(['info', '--qmp', machine.qmp]);
    expect(disks.find(({ names }) => names.includes(name))?.file).toBe(files[index]);
  });

  it('is listed with the others, where none is named', async () => {
    const { status, document } = await cliJson<Disk[]>(['info', '--qmp', machine.qmp]);
    expect(status).toBe(0);
    expect(document.map(({ file }) => file).sort()).toEqual([...files].sort());
    for (const disk of document) {
      expect(disk).toMatchObject({ format: 'qcow2', virtualSize: SIZE, readOnly: false });
      expect(disk.names).toContain(disk.device);
      expect(disk.backing).toHaveLength(1);
    }
    const table = await cli(['info', '--qmp', machine.qmp]);
    expect(table.status).toBe(0);
    for (const { device } of document) expect(table.stdout).toContain(device);
  });

  it('that is not there is an error, which tells what there is', async () => {
    for (const name of ['four', '', 'dev-one ', '/machine', 'drawer']) {
      const { status, stderr, document } = await cliJson<Refusal>(['allocate', '--qmp', machine.qmp, '--device', name]);
      expect(status, name).toBe(1);
      expect(document).toMatchObject({ error: { code: expect.stringMatching(/^UNKNOWN_DEVICE$/) } });
      for (const known of ['dev-one', 'two', 'three']) expect(stderr).toContain(known);
    }
  });

  it('must be named where it is to be changed', async () => {
    const { status, stderr } = await cli(['allocate', '--qmp', machine.qmp]);
    expect(status).toBe(2);
    for (const known of ['dev-one', 'two', 'three']) expect(stderr).toContain(known);
  });

  it('is dealt with beside others in one call', async () => {
    const disks = ['dev-one', 'nonsense', 'two', 'limited'].flatMap((name) => ['--device', name]);
    const outcome = await cliJson<(AllocationResult | Refusal)[]>(['allocate', '--qmp', machine.qmp, ...disks]);
    expect(outcome.status).toBe(1);
    expect(outcome.document).toMatchObject([
      { target: `${machine.qmp}#dev-one`, allocated: SIZE, verified: true },
      { target: `${machine.qmp}#nonsense`, error: { code: 'UNKNOWN_DEVICE' } },
      { target: `${machine.qmp}#two`, allocated: SIZE, verified: true },
      { target: `${machine.qmp}#limited`, allocated: SIZE, verified: true },
    ]);
    expect((await info('three')).document).toMatchObject({ missing: 0, allocated: SIZE });
    const verdict = await cliJson(['verify', '--qmp', machine.qmp, '--device', 'inner', '--preallocation', 'metadata']);
    expect(verdict.document).toMatchObject({ satisfied: true, missing: [] });
    expect(verdict.status).toBe(0);
  });
});
