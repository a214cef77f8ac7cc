/** What a QEMU can do, by its own word. */
import { qmpErrors } from './errors.js';
import { SchemaIndex } from './schema.js';

interface Asked {
  readonly name: string;
  execute(command: 'query-commands' | 'query-qmp-schema'): Promise<unknown>;
}

export class Abilities {
  private names: Promise<Set<string>> | undefined;
  private index: Promise<SchemaIndex> | undefined;

  constructor(private readonly client: Asked) {}

  /** The names of all commands. Asked for once; again only where that failed. */
  commands(): Promise<Set<string>> {
    this.names ??= this.ask('query-commands', 'a list of commands', namesOf).catch((error: unknown) => {
      this.names = undefined;
      throw error;
    });
    return this.names;
  }

  /** The description of all commands, 0.2 MiB. Asked for once; again only where that failed. */
  schema(): Promise<SchemaIndex> {
    this.index ??= this.ask('query-qmp-schema', 'a schema', (schema) => new SchemaIndex(schema)).catch(
      (error: unknown) => {
        this.index = undefined;
        throw error;
      },
    );
    return this.index;
  }

  private async ask<Answer>(
    command: 'query-commands' | 'query-qmp-schema',
    what: string,
    read: (answer: unknown) => Answer,
  ): Promise<Answer> {
    const answer = await this.client.execute(command);
    try {
      return read(answer);
    } catch (error) {
      throw qmpErrors.protocol(this.client.name, `${what} that is none`, error);
    }
  }
}

function namesOf(answer: unknown): Set<string> {
  if (!Array.isArray(answer)) throw new TypeError('the commands are no list');
  return new Set(answer.map((entry: { name?: unknown } | null) => String(entry?.name)));
}
