/** A wire between thicken and a monitor that can be cut. */
import { createConnection, createServer, type Socket } from 'node:net';
import { scratchPath } from '../support/scratch.js';
import { holdClosable } from './rig.js';

export type Direction = 'toQemu' | 'fromQemu';

export interface Cut {
  direction: Direction;
  /** Bytes that still get through. */
  after: number;
}

export interface Relay extends AsyncDisposable {
  path: string;
  /** What has passed in the first connection, by direction. */
  passed: Record<Direction, number>;
  /** Ends of messages, counted in bytes. */
  ends: Record<Direction, number[]>;
  connections: number;
  /** The first connection has been cut. */
  cut: Promise<void>;
}

/** Cuts the first connection where told; `again`: whether others are let through after that. */
export function startRelay(monitor: string, { cut, again = true }: { cut?: Cut; again?: boolean } = {}): Promise<Relay> {
  const path = scratchPath('relay');
  const sockets = new Set<Socket>();
  let tellCut = (): void => undefined;
  const relay: Relay = {
    path,
    passed: { toQemu: 0, fromQemu: 0 },
    ends: { toQemu: [], fromQemu: [] },
    connections: 0,
    cut: new Promise((resolve) => (tellCut = resolve)),
    [Symbol.asyncDispose]: async () => release(),
  };
  const server = createServer((near) => {
    const first = ++relay.connections === 1;
    if (!first && !again) return near.destroy();
    const far = createConnection(monitor);
    const end = () => (near.destroy(), far.destroy());
    const pass = (from: Socket, to: Socket, direction: Direction) => {
      sockets.add(from);
      from.on('error', end).on('close', end);
      from.on('data', (chunk: Buffer) => {
        if (!first) return void to.write(chunk);
        const left = cut?.direction === direction ? cut.after - relay.passed[direction] : Infinity;
        note(relay, direction, chunk);
        if (chunk.length < left) return void to.write(chunk);
        // What was let through arrives before the end does.
        to.end(chunk.subarray(0, Math.max(0, left)), () => (end(), tellCut()));
        from.pause();
      });
    };
    pass(near, far, 'toQemu');
    pass(far, near, 'fromQemu');
  });
  const release = holdClosable(() => {
    server.close();
    for (const socket of sockets) socket.destroy();
  });
  return new Promise((resolve) => server.listen(path, () => resolve(relay)));
}

function note({ passed, ends }: Relay, direction: Direction, chunk: Buffer): void {
  for (let at = chunk.indexOf(10); at >= 0; at = chunk.indexOf(10, at + 1)) ends[direction].push(passed[direction] + at + 1);
  passed[direction] += chunk.length;
}
