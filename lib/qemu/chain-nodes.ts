/** A chain as the storage daemon's nodes: every file by the descriptor that we hold, every format said. */
import process from 'node:process';
import type { Chain, Layer } from '../chain/chain.js';
import { chainErrors } from '../chain/errors.js';
import { hasBacking } from '../chain/header.js';
import { ThickenError } from '../errors.js';
import { fileInUse, fileUse } from '../exclusive.js';
import type { Descriptor } from '../descriptor.js';
import type { NbdUri } from '../nbd/uri.js';
import type { NodeOptions } from '../qmp/commands.js';
import { printable } from '../qmp/errors.js';
import { diskErrors } from './errors.js';
import type { StorageDaemon } from './storage-daemon.js';

/** By the number of its layer: that of the image itself is 0. */
export function nodeOf(layer: number): string {
  return `layer${layer}`;
}

/** The id of what unlocks encrypted layers. */
const KEY = 'key';

/** A server that is gone for longer fails what waits for it. */
const RECONNECT_SECONDS = 5;

export interface ChainAccess {
  /** The highest layer that is wanted. */
  first: number;
  /** Whether the image itself is to be changed; the layers below never are. */
  write: boolean;
  /** Whether QEMU's locks are passed over: for looking at what somebody else has open. */
  share: boolean;
}

/** Adds nodes from the lowest layer up, so that none looks for what lies below it by itself. */
export async function addChain(daemon: StorageDaemon, chain: Chain, access: ChainAccess): Promise<void> {
  const locked = chain.layers.slice(access.first).find(({ header }) => header?.encryption);
  if (!locked) await addLayers(daemon, chain, access);
  else if (!chain.secret) throw chainErrors.secretWanted(locked.path);
  else await daemon.withSecret(KEY, chain.secret, () => addLayers(daemon, chain, access));
}

async function addLayers(daemon: StorageDaemon, chain: Chain, access: ChainAccess): Promise<void> {
  for (let i = chain.layers.length - 1; i >= access.first; i--) {
    const writable = access.write && i === 0;
    const last = i === chain.layers.length - 1;
    try {
      await addLayer(daemon, chain.layers[i]!, i, { ...access, write: writable }, last);
    } catch (error) {
      throw explained(error, chain.layers[i]!, i);
    }
  }
}

/** What LUKS says of a key (crypto/block-luks.c, crypto/secret_common.c). */
const WRONG_KEY = /Invalid password|not valid UTF-8/;

/** QEMU knows the file by our descriptor. */
function explained(error: unknown, { path }: Layer, index: number): unknown {
  if (!(error instanceof ThickenError) || error.code !== 'QMP_COMMAND' || isLocked(error)) return error;
  if (WRONG_KEY.test(error.desc ?? '')) return chainErrors.secretWrong(path, printable(error.desc ?? ''), error);
  const words = (error.desc ?? '').replace(/\/proc\/\d+\/fd\/\d+/g, path);
  return diskErrors.layerRefused(path, index, words, error);
}

/** It is told in words alone (block/file-posix.c). */
export function isLocked(error: unknown): boolean {
  return error instanceof ThickenError && /^Failed to (get|lock) /.test(error.desc ?? '');
}

/** The error that says who holds locks on a layer; of the image itself, where none is seen to. */
export async function inUse({ layers }: Chain): Promise<ThickenError> {
  const files = layers.flatMap(({ source }) => (source.kind === 'nbd' ? [] : [source.file]));
  for (const file of files) {
    const { use } = await fileUse(file);
    if (use) return fileInUse(file, true);
  }
  return fileInUse(files[0]!, true);
}

async function addLayer(
  daemon: StorageDaemon,
  layer: Layer,
  index: number,
  { write, share }: ChainAccess,
  last: boolean,
): Promise<void> {
  const common = { 'read-only': !write, 'auto-read-only': false, ...(share && { 'force-share': true }) };
  const [file, data] = [`file${index}`, `data${index}`];
  await addSource(daemon, layer, file, common);
  if (layer.dataFile) await addFile(daemon, data, layer.dataFile, 'file', common);
  await daemon.addNode({
    driver: layer.format,
    'node-name': nodeOf(index),
    file,
    ...common,
    ...(layer.dataFile && { 'data-file': data }),
    ...(layer.header?.encryption && { encrypt: { format: layer.header.encryption, 'key-secret': KEY } }),
    // null: nothing, whatever the image says.
    ...(hasBacking(layer.format) && { backing: last ? null : nodeOf(index + 1) }),
  });
}

type Common = Record<string, boolean>;

async function addSource(daemon: StorageDaemon, { source }: Layer, name: string, common: Common): Promise<void> {
  if (source.kind === 'nbd') return addServed(daemon, source.uri, name, common);
  await addFile(daemon, name, source.file, source.kind === 'file' ? 'file' : 'host_device', common);
}

/** What the name leads to by now may be another file: the daemon gets the one that was looked at. */
async function addFile(
  daemon: StorageDaemon,
  name: string,
  file: Descriptor,
  driver: 'file' | 'host_device',
  common: Common,
): Promise<void> {
  const number = await file.useNow((fd) => fd);
  await daemon.addFile({ ...common, driver, 'node-name': name, filename: `/proc/${process.pid}/fd/${number}` });
}

async function addServed(daemon: StorageDaemon, uri: NbdUri, name: string, common: Common): Promise<void> {
  const node = nbdNode(uri, name, common);
  if (!uri.tls) return daemon.addNode(node);
  const id = `tls-${name}`;
  await daemon.addCertificates(id, uri.tlsCertificates!);
  // QEMU 7.2 would not look at the name in the certificate of a server on a UNIX socket.
  const host = 'host' in uri.endpoint ? uri.endpoint.host : 'localhost';
  await daemon.addNode({ ...node, 'tls-creds': id, 'tls-hostname': uri.tlsHostname ?? host });
}

function nbdNode({ endpoint, exportName }: NbdUri, name: string, common: Common): NodeOptions {
  const server =
    'socketPath' in endpoint
      ? { type: 'unix', path: endpoint.socketPath }
      : { type: 'inet', host: endpoint.host, port: String(endpoint.port) };
  const how = { driver: 'nbd', 'node-name': name, server, export: exportName };
  return { ...how, 'reconnect-delay': RECONNECT_SECONDS, ...common };
}
