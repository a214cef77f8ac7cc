/** What a QEMU can do, by its own description (`query-qmp-schema`). Pure. */
import { isObject } from './message.js';

/**
 * The part of the schema that answers what commands and arguments there are. Types are named by
 * numbers that mean nothing ("61"), and differ from build to build.
 */
export class SchemaIndex {
  private readonly commands = new Map<string, string>();
  /** Object → its members → their types. */
  private readonly objects = new Map<string, Map<string, string>>();
  /** Union or alternate → what it may turn out to be. */
  private readonly variants = new Map<string, string[]>();
  private readonly elements = new Map<string, string>();
  private readonly values = new Map<string, Set<string>>();

  /** Throws a TypeError where the description is none. Unknown kinds of entries are passed over. */
  constructor(schema: unknown) {
    if (!Array.isArray(schema)) throw new TypeError('the schema is no list');
    for (const entry of schema) if (isObject(entry)) this.add(entry);
  }

  private add(entry: Record<string, unknown>): void {
    const name = text(entry['name']);
    switch (entry['meta-type']) {
      case 'command':
        this.commands.set(name, text(entry['arg-type']));
        break;
      case 'object':
        this.objects.set(name, new Map(pairs(entry['members'], 'name')));
        this.variants.set(name, pairs(entry['variants'], 'case').map(([, type]) => type));
        break;
      case 'alternate':
        this.variants.set(name, pairs(entry['members'], 'type').map(([, type]) => type));
        break;
      case 'array':
        this.elements.set(name, text(entry['element-type']));
        break;
      case 'enum':
        this.values.set(name, new Set(enumValues(entry)));
    }
  }

  /**
   * Whether `command` takes the argument at `path` (`member.member…`, through lists, and through
   * any variant of a union), and, if a value is given, whether it may be that word.
   */
  hasArgument(command: string, path: string, value?: string): boolean {
    const root = this.commands.get(command);
    if (root === undefined) return false;
    let types = [root];
    for (const member of path.split('.')) {
      types = types.flatMap((type) => this.typesOfMember(type, member));
    }
    if (value === undefined) return types.length > 0;
    return types.some((type) => this.spread(type).some((name) => this.values.get(name)?.has(value)));
  }

  private typesOfMember(type: string, member: string): string[] {
    const found = this.spread(type).map((name) => this.objects.get(name)?.get(member));
    return [...new Set(found)].filter((name) => name !== undefined);
  }

  /** A type, and all that it may turn out to be: elements of lists, variants of unions. */
  private spread(type: string): string[] {
    const seen = new Set([type]);
    for (const name of seen) {
      const element = this.elements.get(name);
      if (element !== undefined) seen.add(element);
      for (const variant of this.variants.get(name) ?? []) seen.add(variant);
    }
    return [...seen];
  }
}

function text(value: unknown): string {
  return typeof value === 'string' ? value : '';
}

/** [name, type] of each entry of a list. */
function pairs(list: unknown, key: string): [string, string][] {
  if (!Array.isArray(list)) return [];
  return list.filter(isObject).map((entry) => [text(entry[key]), text(entry['type'])]);
}

/** QEMU up to 6.1 lists `values` only; newer ones `members`, with features. */
function enumValues(entry: Record<string, unknown>): string[] {
  const members = pairs(entry['members'], 'name').map(([name]) => name);
  const values = Array.isArray(entry['values']) ? entry['values'] : [];
  return [...members, ...values.filter((value) => typeof value === 'string')];
}
