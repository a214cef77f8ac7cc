import { randomBytes } from 'node:crypto';
import { closeSync, openSync, writeSync } from 'node:fs';
import { connectSocket, type QmpTransport } from '../../lib/qmp/transport.js';
import { QmpClient } from '../../lib/qmp/client.js';
import { isObject } from '../../lib/qmp/message.js';
import { mustRun, startQemu, type QemuOptions } from '../support/processes.js';
import { scratchPath } from '../support/scratch.js';

export const MiB = 2 ** 20;

/** A raw file of data that does not compress, and an empty qcow2 over it. */
export async function chain(
  size: number,
  overlay = scratchPath('overlay.qcow2'),
): Promise<{ base: string; overlay: string }> {
  const base = scratchPath('base.raw');
  const fd = openSync(base, 'w');
  try {
    for (let at = 0; at < size; at += MiB) writeSync(fd, randomBytes(MiB), 0, MiB, at);
  } finally {
    closeSync(fd);
  }
  await mustRun('qemu-img', ['create', '-q', '-f', 'qcow2', '-F', 'raw', '-b', base, overlay]);
  return { base, overlay };
}

export type Opened = AsyncDisposable & { client: QmpClient; pid: number; address: string; nbd: string | null };

/** A QEMU whose node `disk` is `file`, and a client of its monitor. */
export async function openQemu(
  file: string,
  kind: QemuOptions['kind'] = 'daemon',
  wrap: (transport: QmpTransport) => QmpTransport = (transport) => transport,
): Promise<Opened> {
  const qemu = await startQemu({ file, format: 'qcow2', kind });
  const address = `unix:${qemu.qmp}`;
  const client = await QmpClient.connect(wrap(await connectSocket(address)));
  const dispose = async (): Promise<void> => {
    // What QEMU holds of its tables in memory is written when it ends in peace.
    if (client.state === 'ready') await client.executeAny('quit');
    await client.onLost;
    await qemu.dispose();
  };
  return { client, pid: qemu.pid, nbd: qemu.nbd, address, [Symbol.asyncDispose]: dispose };
}

/** The same transport where events do not come. */
export function withoutEvents(socket: QmpTransport): QmpTransport {
  return {
    name: socket.name,
    events: false,
    handshake: true,
    start: (receiver) =>
      socket.start({
        message: (value, bytes) => {
          if (!('event' in value)) receiver.message(value, bytes);
        },
        ended: (error) => receiver.ended(error),
      }),
    send: (text) => socket.send(text),
    close: () => socket.close(),
    peerPid: () => socket.peerPid(),
  };
}

/** Commands relayed by somebody who holds the monitor and gives them ids of its own, as libvirt does. */
export function relayedBy(owner: QmpClient): QmpTransport {
  let tell: (value: Record<string, unknown>) => void = () => {};
  return {
    name: 'relay',
    events: false,
    handshake: false,
    start: (receiver) => {
      tell = (value) => receiver.message(value, JSON.stringify(value).length);
      void owner.onLost.then((error) => error && receiver.ended(error));
    },
    send: async (text) => {
      const { execute, arguments: args, id } = JSON.parse(text);
      owner.executeAny(execute, args).then(
        (value) => tell({ return: value, id }),
        (error: unknown) => {
          if (!isObject(error)) return;
          tell({ error: { class: error['qmpClass'], desc: error['desc'] }, id });
        },
      );
    },
    close: async () => {},
    peerPid: () => null,
  };
}
