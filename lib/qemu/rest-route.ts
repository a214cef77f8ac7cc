/** Routes of a running guest, on an image at rest: a storage daemon has it open for as long as they work. */
import type { Chain } from '../chain/chain.js';
import type { CancelFlag } from '../native.js';
import type { GuestContext } from '../routes/populate.js';
import type { Cut, Mechanism, Route, RouteRequest, RouteSession, WholeControl } from '../routes/route.js';
import { nodeOf } from './chain-nodes.js';
import { RestEngine } from './rest-engine.js';

const MIB = 2 ** 20;

/**
 * Only a cancel waits for a chunk: what counts is that the storage always has enough to do. Zeros that no
 * map tells of stay zeros in a chunk of nothing else: larger ones find fewer, and smaller ones take longer
 * (a MiB: 1.2 times as long with storage in memory). Over a template at 2 MB/s, a cancel waited 15 s for
 * eight of them.
 */
const CUT: Pick<Cut, 'chunk' | 'most' | 'depth' | 'adapts'> = {
  chunk: { bytes: 4 * MIB, ranges: 64 },
  most: { bytes: 4 * MIB, ranges: 64 },
  depth: 8,
  adapts: 'depth',
};

export interface RestContext extends RouteRequest {
  /** Bytes of a cluster. */
  granularity: number;
  chain: () => Chain;
  /** Ends what has the image open for reading. */
  letGo: () => Promise<void>;
  /** Told when the image has been changed, and the daemon is gone. */
  after: () => Promise<void>;
}

export function restRoute(mechanism: Mechanism<GuestContext>, context: RestContext): Route {
  const cut = mechanism.adapts === 'window' ? CUT : {};
  return { ...mechanism, ...cut, open: (cancel) => openSession(mechanism, context, cancel) };
}

/** Takes QEMU's locks, by the daemon. Throws IN_USE where somebody else has the image open. */
async function openSession(
  mechanism: Mechanism<GuestContext>,
  context: RestContext,
  cancel: CancelFlag,
): Promise<RouteSession> {
  await context.letGo();
  const { dataFile } = context.chain().top;
  // Copies alone take no permission to write to a data file, and ended QEMU by an assertion there (7.2).
  const engine = await RestEngine.work(context.chain(), mechanism.name === 'nbd-write' || dataFile !== null);
  try {
    const { daemon, added } = engine;
    const place = { client: daemon.qmp, node: nodeOf(0), nbd: added.nbd, keepsZeros: true };
    const session = await mechanism.open({ ...context, ...place }, cancel);
    return restSession(session, engine, context.chain().top.path, () => context.after());
  } catch (error) {
    await engine[Symbol.asyncDispose]();
    throw error;
  }
}

/** Where the daemon ends, that is why something failed. */
function restSession(
  session: RouteSession,
  engine: RestEngine,
  path: string,
  after: () => Promise<void>,
): RouteSession {
  const explained = async <T>(work: Promise<T>): Promise<T> => {
    try {
      return await work;
    } catch (error) {
      throw await engine.daemon.explain(error, path);
    }
  };
  const whole = session.runWhole?.bind(session);
  return {
    run: (ranges: Float64Array, cancel: CancelFlag) => explained(session.run(ranges, cancel)),
    sync: (cancel: CancelFlag) => explained(session.sync(cancel)),
    ...(whole && { runWhole: (control: WholeControl, bytes: number) => explained(whole(control, bytes)) }),
    async [Symbol.asyncDispose]() {
      try {
        await session[Symbol.asyncDispose]();
      } finally {
        await engine[Symbol.asyncDispose]();
        await after();
      }
    },
  };
}
