/** How QEMU's nodes hang together, which only a command for debugging tells (QEMU 3.1 and later). */
import { ThickenError } from '../errors.js';
import type { QmpClient } from '../qmp/client.js';
import { isObject } from '../qmp/message.js';

const GRAPH = 'x-debug-query-block-graph';

export class NodeGraph {
  private readonly children = new Map<string, Map<string, string>>();
  private readonly parents = new Set<string>();
  private readonly drivers: string[] = [];

  /** Pure; passes over what is not as it must be. */
  constructor(graph: unknown) {
    const names = new Map<number, { name: string; type: string }>();
    for (const { id, name, type } of list(graph, 'nodes')) {
      if (typeof id !== 'number' || typeof name !== 'string' || typeof type !== 'string') continue;
      names.set(id, { name, type });
      if (type === 'block-driver') this.drivers.push(name);
    }
    for (const edge of list(graph, 'edges')) {
      const parent = names.get(edge['parent'] as number);
      const child = names.get(edge['child'] as number);
      if (parent?.type !== 'block-driver' || !child || typeof edge['name'] !== 'string') continue;
      this.parents.add(child.name);
      const below = this.children.get(parent.name) ?? new Map<string, string>();
      this.children.set(parent.name, below.set(edge['name'], child.name));
    }
  }

  /** The node below, by the role that it has there (`file`, `backing`, …). */
  child(node: string, role: string): string | undefined {
    return this.children.get(node)?.get(role);
  }

  /** Nodes that are part of no other. */
  tops(): string[] {
    return this.drivers.filter((name) => !this.parents.has(name));
  }
}

function list(graph: unknown, key: string): Record<string, unknown>[] {
  const entries = isObject(graph) ? graph[key] : undefined;
  return Array.isArray(entries) ? entries.filter(isObject) : [];
}

/** Empty where QEMU does not tell: nothing that is needed may depend on it. */
export async function readGraph(client: QmpClient): Promise<NodeGraph> {
  if (!(await client.supports(GRAPH))) return new NodeGraph(null);
  try {
    return new NodeGraph(await client.executeAny(GRAPH));
  } catch (error) {
    if (error instanceof ThickenError && error.code === 'QMP_COMMAND') return new NodeGraph(null);
    throw error;
  }
}
