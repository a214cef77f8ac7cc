/** Routes of a running guest, on an image at rest: a storage daemon has it open for as long as they work. */
import type { Chain } from '../chain/chain.js';
import type { CancelFlag, Work } from '../native.js';
import type { GuestContext } from '../routes/populate.js';
import type { Cut, Mechanism, Route, RouteRequest, RouteSession, WholeControl } from '../routes/route.js';
import { TOP } from './chain-nodes.js';
import { RestEngine } from './rest-engine.js';

const MIB = 2 ** 20;

/** Nobody waits for a chunk: what counts is that the storage always has enough to do. */
const CUT: Pick<Cut, 'chunk' | 'most' | 'depth' | 'adapts'> = {
  chunk: { bytes: 4 * MIB, ranges: 64 },
  most: { bytes: 4 * MIB, ranges: 64 },
  depth: 8,
  adapts: 'no',
};

export interface RestContext extends RouteRequest {
  /** Bytes of a cluster. */
  granularity: number;
  chain(): Chain;
  /** Ends what has the image open for reading. */
  letGo(): Promise<void>;
}

export function restRoute(mechanism: Mechanism<GuestContext>, context: RestContext): Route {
  const cut = mechanism.adapts === 'window' ? CUT : {};
  return { ...mechanism, ...cut, open: () => openSession(mechanism, context) };
}

/** Takes QEMU's locks, by the daemon. Throws IN_USE where somebody else has the image open. */
async function openSession(mechanism: Mechanism<GuestContext>, context: RestContext): Promise<RouteSession> {
  const { chain, letGo, ...request } = context;
  await letGo();
  const engine = await RestEngine.work(chain());
  try {
    const { daemon, added } = engine;
    const session = await mechanism.open({ ...request, client: daemon.qmp, node: TOP, nbd: added.nbd });
    return new RestSession(session, engine, chain().top.path);
  } catch (error) {
    await engine[Symbol.asyncDispose]();
    throw error;
  }
}

/** Where the daemon ends, that is why something failed. */
class RestSession implements RouteSession {
  readonly runWhole: RouteSession['runWhole'];

  constructor(
    private readonly session: RouteSession,
    private readonly engine: RestEngine,
    private readonly path: string,
  ) {
    const { runWhole } = session;
    if (!runWhole) return;
    this.runWhole = (control: WholeControl, bytes: number) =>
      this.explained(runWhole.call(session, control, bytes));
  }

  run(ranges: Float64Array, cancel: CancelFlag): Promise<Work> {
    return this.explained(this.session.run(ranges, cancel));
  }

  sync(): Promise<void> {
    return this.explained(this.session.sync());
  }

  private async explained<T>(work: Promise<T>): Promise<T> {
    try {
      return await work;
    } catch (error) {
      throw await this.engine.daemon.explain(error, this.path);
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.session[Symbol.asyncDispose]();
    } finally {
      await this.engine[Symbol.asyncDispose]();
    }
  }
}
