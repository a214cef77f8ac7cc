/** The disks of a QEMU, and the names that they answer to. */
import type { QmpClient } from '../qmp/client.js';
import type { BlockDevice, BlockNode, ImageFacts } from '../qmp/commands.js';
import { printable } from '../qmp/errors.js';
import { diskErrors } from './errors.js';
import { readGraph, type NodeGraph } from './graph.js';

/** A file that a layer's content comes from. */
export interface Layer {
  path: string;
  format: string | null;
  virtualSize: number | null;
}

export interface GuestDisk {
  /** The best of its names. */
  name: string;
  names: string[];
  /** The node of the image format: what is exported and streamed. */
  node: string;
  format: string;
  /** The image's file as QEMU names it. */
  file: string;
  /** What opens the file: `file`, `host_device`, …; null where QEMU does not tell. */
  protocol: string | null;
  /** Bytes. */
  size: number;
  clusterSize: number;
  /** Whether clusters are mapped in parts. */
  subclusters: boolean;
  readOnly: boolean;
  encrypted: boolean;
  /** From the next layer down to the last. */
  backing: Layer[];
  snapshots: number;
  image: ImageFacts;
}

/** Nodes that only pass requests on (block/*.c of QEMU, is_filter). */
const FILTERS = new Set(['throttle', 'copy-on-read', 'compress', 'preallocate', 'copy-before-write']);
const MOST_FILTERS = 32;
/** Of formats that tell none: QEMU's usual cluster. */
const DEFAULT_CLUSTER = 65_536;

/** All disks that have an image; of a storage daemon, all nodes of a format that nothing uses. */
export async function listDisks(client: QmpClient): Promise<GuestDisk[]> {
  const [nodes, graph] = await Promise.all([nodesOf(client), readGraph(client)]);
  const devices = (await client.supports('query-block')) ? await client.execute('query-block') : [];
  const found = devices.flatMap((device) => diskOfDevice(device, nodes, graph) ?? []);
  if (devices.length > 0) return found;
  return graph.tops().flatMap((name) => {
    const node = nodes.get(name);
    return node ? [diskOf([name], node, nodes, graph)] : [];
  });
}

/** Throws UNKNOWN_DEVICE, which tells what there is. */
export async function findDisk(client: QmpClient, name: string): Promise<GuestDisk> {
  const disks = await listDisks(client);
  const disk = disks.find(({ names }) => names.includes(name));
  if (disk) return disk;
  const [nodes, graph] = await Promise.all([nodesOf(client), readGraph(client)]);
  const node = nodes.get(name);
  if (node) return diskOf([name], node, nodes, graph);
  throw diskErrors.unknown(client.name, name, disks.map((known) => known.name));
}

/** With their backing images inside: `flat` would leave those out. */
async function nodesOf(client: QmpClient): Promise<Map<string, BlockNode>> {
  const list = await client.execute('query-named-block-nodes', {});
  return new Map(list.map((node) => [node['node-name'] ?? '', node]));
}

function diskOfDevice(device: BlockDevice, nodes: Map<string, BlockNode>, graph: NodeGraph) {
  const { inserted } = device;
  if (!inserted) return null;
  return diskOf(namesOf(device), inserted, nodes, graph);
}

/**
 * Those first that a user gave: QEMU makes up a path where a device has no id, and a name with # for
 * a node without one. `/machine/peripheral/ID/virtio-backend` is the backend of the device with that ID.
 */
function namesOf({ qdev, device, inserted }: BlockDevice): string[] {
  const path = qdev?.replace(/\/virtio-backend$/, '');
  const id = path?.replace(/^\/machine\/peripheral\//, '');
  const names = [id, device, inserted?.['node-name'], path, qdev];
  const given = names.filter((name): name is string => Boolean(name));
  const madeUp = (name: string) => Number(/^[/#]/.test(name));
  return [...new Set(given.sort((a, b) => madeUp(a) - madeUp(b)))];
}

function diskOf(
  names: string[],
  root: BlockNode,
  nodes: Map<string, BlockNode>,
  graph: NodeGraph,
): GuestDisk {
  const node = withoutFilters(root, nodes, graph);
  const { image } = node;
  const nodeName = node['node-name'] ?? '';
  const all = [...new Set([...names, nodeName])];
  return {
    name: printable(all[0] ?? nodeName),
    names: all,
    node: nodeName,
    format: node.drv,
    file: node.file,
    protocol: nodes.get(graph.child(nodeName, 'file') ?? '')?.drv ?? null,
    size: image['virtual-size'],
    clusterSize: image['cluster-size'] ?? DEFAULT_CLUSTER,
    subclusters: image['format-specific']?.data?.['extended-l2'] === true,
    readOnly: node.ro,
    encrypted: node.encrypted,
    backing: layersBelow(image),
    snapshots: image.snapshots?.length ?? 0,
    image,
  };
}

function withoutFilters(root: BlockNode, nodes: Map<string, BlockNode>, graph: NodeGraph): BlockNode {
  let node = root;
  for (let i = 0; i < MOST_FILTERS && FILTERS.has(node.drv); i++) {
    const name = node['node-name'] ?? '';
    const below = nodes.get(graph.child(name, 'file') ?? graph.child(name, 'backing') ?? '');
    if (!below) break;
    node = below;
  }
  return node;
}

function layersBelow(image: ImageFacts): Layer[] {
  const layers: Layer[] = [];
  for (let below = image['backing-image']; below; below = below['backing-image']) {
    const { filename, format } = below;
    layers.push({ path: printable(filename), format, virtualSize: below['virtual-size'] });
  }
  return layers;
}
