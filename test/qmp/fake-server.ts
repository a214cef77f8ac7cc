import { createServer, type Socket } from 'node:net';
import { once } from 'node:events';
import { hold } from '../support/cleanup.js';
import { scratchPath } from '../support/scratch.js';

export const GREETING = '{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}\n';

export interface Command {
  execute: string;
  id: number;
  oob: boolean;
  arguments: Record<string, unknown>;
}

/** One client's connection, seen from the server. */
export interface Peer {
  socket: Socket;
  /** Commands that came, with capabilities negotiated by the server itself. */
  commands: Command[];
  /** Resolves once so many commands have come. */
  received(count: number): Promise<Command[]>;
  write(data: string | Uint8Array): void;
  reply(id: number, value?: unknown): void;
}

export interface FakeServer extends AsyncDisposable {
  address: string;
  peers: Peer[];
  dispose(): Promise<void>;
}

export interface FakeOptions {
  /** null: says nothing. */
  greeting?: string | null;
  /** Whether qmp_capabilities is answered. */
  negotiates?: boolean;
  onCommand?: (command: Command, peer: Peer) => void;
  onConnection?: (peer: Peer) => void;
  tcp?: boolean;
}

/** A real socket, behind which a peer behaves as badly as a test wants. */
export async function fakeServer(options: FakeOptions = {}): Promise<FakeServer> {
  const peers: Peer[] = [];
  const server = createServer((socket) => {
    const peer = serve(socket, options);
    peers.push(peer);
    options.onConnection?.(peer);
  });
  const path = scratchPath('fake');
  if (options.tcp) server.listen(0, '127.0.0.1');
  else server.listen(path);
  await once(server, 'listening');
  const bound = server.address();
  const dispose = hold({
    release: async () => {
      const closed = new Promise((resolve) => server.close(resolve));
      for (const { socket } of peers) socket.destroy();
      await closed;
    },
    releaseSync: () => undefined,
  });
  const address = typeof bound === 'object' && bound ? `tcp:127.0.0.1:${bound.port}` : `unix:${path}`;
  return { address, peers, dispose, [Symbol.asyncDispose]: dispose };
}

function serve(socket: Socket, options: FakeOptions): Peer {
  const { greeting = GREETING, negotiates = true, onCommand } = options;
  const commands: Command[] = [];
  let wake = () => {};
  const write = (data: string | Uint8Array): void => {
    if (socket.writable) socket.write(data);
  };
  const reply = (id: number, value: unknown = {}) => write(`${JSON.stringify({ return: value, id })}\n`);
  const received = async (count: number): Promise<Command[]> => {
    while (commands.length < count) await new Promise<void>((resolve) => (wake = resolve));
    return commands;
  };
  const peer = { socket, commands, received, write, reply };
  const take = (command: Command): void => {
    if (command.execute === 'qmp_capabilities') {
      if (negotiates) reply(command.id);
      return;
    }
    commands.push(command);
    wake();
    onCommand?.(command, peer);
  };
  readLines(socket, (line) => take(commandOf(line)));
  socket.on('error', () => undefined);
  if (greeting !== null) write(greeting);
  return peer;
}

function commandOf(line: string): Command {
  const { execute, 'exec-oob': oob, id, arguments: args = {} } = JSON.parse(line);
  return { execute: execute ?? oob, oob: oob !== undefined, id, arguments: args };
}

function readLines(socket: Socket, take: (line: string) => void): void {
  let text = '';
  socket.setEncoding('utf8').on('data', (chunk: string) => {
    const lines = (text + chunk).split('\n');
    text = lines.pop() ?? '';
    lines.forEach(take);
  });
}
