/** Which device each job works on, which only QEMU's graph of nodes tells. */
import { ThickenError } from '../errors.js';
import type { QmpClient } from './client.js';
import { isObject } from './message.js';

const GRAPH = 'x-debug-query-block-graph';

/**
 * Job → the guest's device, or the node where no device is above it. Empty where QEMU does not
 * tell: the command is for debugging (QEMU 3.1 and later), so nothing may depend on it.
 */
export async function devicesOfJobs(client: QmpClient): Promise<Map<string, string>> {
  if (!(await client.supports(GRAPH))) return new Map();
  try {
    return readDevices(await client.executeAny(GRAPH));
  } catch (error) {
    if (error instanceof ThickenError && error.code === 'QMP_COMMAND') return new Map();
    throw error;
  }
}

interface Vertex {
  name: string;
  type: string;
  above: number[];
  below: number[];
}

/** Pure; passes over what is not as it must be. */
export function readDevices(graph: unknown): Map<string, string> {
  const vertices = new Map<number, Vertex>();
  for (const { id, name, type } of list(graph, 'nodes')) {
    if (typeof id !== 'number' || typeof name !== 'string' || typeof type !== 'string') continue;
    vertices.set(id, { name, type, above: [], below: [] });
  }
  const mains = new Map<string, number>();
  for (const { parent, child, name } of list(graph, 'edges')) {
    if (typeof parent !== 'number' || typeof child !== 'number') continue;
    const above = vertices.get(parent);
    if (above?.type === 'block-job') {
      if (name === 'main node') mains.set(above.name, child);
      continue;
    }
    above?.below.push(child);
    vertices.get(child)?.above.push(parent);
  }
  const found = [...mains].map(([job, node]) => [job, deviceOf(vertices, node)] as const);
  return new Map(found.filter((pair): pair is [string, string] => pair[1] !== undefined));
}

function list(graph: unknown, key: string): Record<string, unknown>[] {
  const entries = isObject(graph) ? graph[key] : undefined;
  return Array.isArray(entries) ? entries.filter(isObject) : [];
}

/** A job's main node is often a filter of its own, whose generated name says nothing to anybody. */
function deviceOf(vertices: Map<number, Vertex>, node: number): string | undefined {
  const above = walk(vertices, node, 'above');
  const below = walk(vertices, node, 'below');
  const device = above.find(({ type, name }) => type === 'block-backend' && name !== '');
  if (device) return idOf(device.name);
  return below.find(({ name }) => !name.startsWith('#'))?.name;
}

/** A backend made for a device goes by the device's path: /machine/peripheral/ID/virtio-backend. */
function idOf(name: string): string {
  return /^\/machine\/peripheral\/([^/]+)/.exec(name)?.[1] ?? name;
}

function walk(vertices: Map<number, Vertex>, from: number, way: 'above' | 'below'): Vertex[] {
  const seen = new Set([from]);
  for (const id of seen) {
    for (const next of vertices.get(id)?.[way] ?? []) seen.add(next);
  }
  return [...seen].map((id) => vertices.get(id)).filter((vertex) => vertex !== undefined);
}
