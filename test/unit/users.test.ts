import fc from 'fast-check';
import { readdirSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { describe, expect, test } from 'vitest';
import { deviceName, makeDevice, usersOfDevice, usersOfFile } from '../../lib/users.js';
import { attachLoop, writePartitionTable } from '../support/loop.js';
import { mustRun, start } from '../support/processes.js';
import { requires } from '../support/requirements.js';
import { scratchPath } from '../support/scratch.js';
import { waitFor } from '../support/wait.js';

const MIB = 2 ** 20;

describe('a device number', () => {
  test.each([
    [0, 0, 0],
    [8, 1, 0x801],
    [259, 3, 0x10303],
    [253, 256, 0x10fd00],
    [7, 0xfffff, 0xfff007ff],
    [0xfff, 0xff, 0xfffff],
  ])('of %d:%d is %d', (major, minor, number) => {
    expect(makeDevice(major, minor)).toBe(number);
    expect(deviceName(number)).toBe(`${major}:${minor}`);
  });

  test('comes back from its name, for all that the kernel gives (12 and 20 bits)', () => {
    fc.assert(
      fc.property(fc.nat(0xfff), fc.nat(0xfffff), (major, minor) => {
        expect(deviceName(makeDevice(major, minor))).toBe(`${major}:${minor}`);
      }),
    );
  });

  test('comes back from its name beyond that, as far as a number is exact', () => {
    fc.assert(
      fc.property(fc.nat(0x1fffff), fc.nat(0xffffffff), (major, minor) => {
        fc.pre(Number.isSafeInteger(makeDevice(major, minor)));
        expect(deviceName(makeDevice(major, minor))).toBe(`${major}:${minor}`);
      }),
    );
  });

  test('is the one that stat gives for each node of this machine', async () => {
    const nodes = readdirSync('/dev').map((name) => `/dev/${name}`);
    const devices = nodes.filter((node) => statSync(node, { throwIfNoEntry: false })?.rdev);
    expect(devices.length).toBeGreaterThan(0);
    const told = await mustRun('stat', ['-L', '-c', '%t %T', ...devices]);
    told.trim().split('\n').forEach((line, i) => {
      const [major = 0, minor = 0] = line.split(' ').map((part) => Number.parseInt(part, 16));
      const { rdev } = statSync(devices[i]!);
      expect([devices[i], deviceName(rdev)]).toEqual([devices[i], `${major}:${minor}`]);
      expect(makeDevice(major, minor)).toBe(rdev);
    });
  });
});

/** A process that has the file open as descriptor 3, and what it looks like in a list of users. */
async function holder(path: string) {
  const child = start('bash', ['-c', `exec 3<>"$1"; echo open; exec sleep 600`, 'bash', path]);
  await child.output('stdout', /open/);
  await waitFor('the process to be sleep', async () => (await commandOf(child.pid)) === 'sleep');
  return { child, name: `sleep (pid ${child.pid})` };
}

async function commandOf(pid: number): Promise<string> {
  const file = await open(`/proc/${pid}/comm`);
  try {
    return (await file.readFile('utf8')).trim();
  } finally {
    await file.close();
  }
}

describe.runIf(requires({ root: true }))('usersOfFile', () => {
  test('names a process that has the file open, by whatever name, until it ends', async () => {
    const path = scratchPath();
    writeFileSync(path, 'x');
    await mustRun('ln', [path, `${path}-link`]);
    const { child, name } = await holder(`${path}-link`);
    expect(await usersOfFile(statSync(path))).toEqual({ by: [name], blind: false });
    await child.dispose();
    expect(await usersOfFile(statSync(path))).toEqual({ by: [], blind: false });
  });

  test('leaves this process out', async () => {
    const path = scratchPath();
    await using _ = await open(path, 'w');
    expect((await usersOfFile(statSync(path))).by).toEqual([]);
  });

  test('does not name who has another file open', async () => {
    const [path, other] = [scratchPath(), scratchPath()];
    writeFileSync(path, 'x');
    writeFileSync(other, 'x');
    await holder(other);
    expect((await usersOfFile(statSync(path))).by).toEqual([]);
  });
});

function imageFile(): string {
  const path = scratchPath('disk');
  writeFileSync(path, '');
  truncateSync(path, 8 * MIB);
  return path;
}

describe.runIf(requires({ root: true, loop: true, tools: ['losetup'] }))('loop devices', () => {
  test('are users of their files', async () => {
    const file = imageFile();
    await using loop = await attachLoop({ file });
    expect((await usersOfFile(statSync(file))).by).toEqual([loop.device]);
    await loop.dispose();
    expect((await usersOfFile(statSync(file))).by).toEqual([]);
  });

  test('have a user in whoever opened them, but for the descriptors that are said to be our own', async () => {
    await using loop = await attachLoop({ file: imageFile() });
    expect((await usersOfDevice(statSync(loop.device).rdev, new Set())).by).toEqual([]);
    await using own = await open(loop.device, 'r');
    expect((await usersOfDevice(statSync(loop.device).rdev, new Set([own.fd]))).by).toEqual([]);
    expect((await usersOfDevice(statSync(loop.device).rdev, new Set())).by).toEqual([expect.stringContaining(`(pid ${process.pid})`)]);
    const { child, name } = await holder(loop.device);
    expect((await usersOfDevice(statSync(loop.device).rdev, new Set([own.fd]))).by).toEqual([name]);
    await child.dispose();
  });

  test('have users in those of the loop devices over them', async () => {
    await using below = await attachLoop({ file: imageFile() });
    await using above = await attachLoop({ file: below.device });
    expect((await usersOfDevice(statSync(below.device).rdev, new Set())).by).toEqual([above.device]);
  });
});

describe.runIf(requires({ root: true, loop: true, tools: ['losetup', 'partx'] }))('partitions', () => {
  async function partitioned() {
    const file = imageFile();
    const parts = [1, 4].map((start) => ({ offset: start * MIB, length: 2 * MIB }));
    await writePartitionTable(file, parts);
    return attachLoop({ file, partitioned: true });
  }

  test('in use are uses of their disk, and not of each other', async () => {
    await using loop = await partitioned();
    const [first = '', second = ''] = loop.partitions;
    const { child, name } = await holder(first);
    expect((await usersOfDevice(statSync(loop.device).rdev, new Set())).by).toEqual([name]);
    expect((await usersOfDevice(statSync(first).rdev, new Set())).by).toEqual([name]);
    expect((await usersOfDevice(statSync(second).rdev, new Set())).by).toEqual([]);
    await child.dispose();
    expect((await usersOfDevice(statSync(loop.device).rdev, new Set())).by).toEqual([]);
  });

  test('are in use where their disk is', async () => {
    await using loop = await partitioned();
    const { child, name } = await holder(loop.device);
    expect((await usersOfDevice(statSync(loop.partitions[0] ?? '').rdev, new Set())).by).toEqual([name]);
    await child.dispose();
  });
});
