/** What a message of a QMP server's means. Pure. */
import { WireError, type JsonObject } from './wire.js';

export interface QmpEvent {
  name: string;
  data: JsonObject;
  /** Milliseconds since 1970 by QEMU's clock; null where it could not tell. */
  timestamp: number | null;
}

export type QmpMessage =
  | { kind: 'greeting'; capabilities: string[] }
  | { kind: 'event'; event: QmpEvent }
  | { kind: 'return'; id: number; value: unknown }
  | { kind: 'error'; id: number; qmpClass: string; desc: string };

/** Events are small; with a queue of them this is what bounds memory. */
const MOST_EVENT_BYTES = 256 * 1024;

const KINDS = ['QMP', 'event', 'return', 'error'];

export function isObject(value: unknown): value is JsonObject {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

/** Throws WireError where a message contradicts itself, or is none of QMP's. */
export function readMessage(value: JsonObject, bytes: number): QmpMessage {
  const kinds = KINDS.filter((key) => Object.hasOwn(value, key));
  if (kinds.length > 1) throw new WireError(`a message that is ${kinds.join(' and ')} at once`);
  switch (kinds[0]) {
    case 'QMP':
      return { kind: 'greeting', capabilities: capabilitiesOf(value['QMP']) };
    case 'event':
      if (bytes > MOST_EVENT_BYTES) throw new WireError(`an event of ${bytes} bytes`);
      return { kind: 'event', event: eventOf(value) };
    case 'return':
      return { kind: 'return', id: idOf(value), value: value['return'] };
    case 'error':
      return errorOf(value);
    case undefined:
    default:
      throw new WireError('an object that is no greeting, event or reply');
  }
}

function capabilitiesOf(greeting: unknown): string[] {
  const offered = isObject(greeting) ? (greeting['capabilities'] ?? []) : undefined;
  if (!Array.isArray(offered)) throw new WireError('a greeting without capabilities');
  return offered.filter((name) => typeof name === 'string');
}

function eventOf(value: JsonObject): QmpEvent {
  const { event: name, data = {}, timestamp } = value;
  if (typeof name !== 'string' || !isObject(data)) throw new WireError('an event without name or data');
  return { name, data, timestamp: millisecondsOf(timestamp) };
}

/** QEMU sends -1 for both parts where its clock failed. */
function millisecondsOf(timestamp: unknown): number | null {
  if (!isObject(timestamp)) return null;
  const { seconds, microseconds } = timestamp;
  const known = typeof seconds === 'number' && typeof microseconds === 'number' && seconds >= 0;
  return known ? seconds * 1000 + microseconds / 1000 : null;
}

function idOf(value: JsonObject): number {
  const { id } = value;
  if (typeof id !== 'number') throw new WireError('a reply without the id of a command');
  return id;
}

function errorOf(value: JsonObject): QmpMessage {
  const { error } = value;
  const { class: qmpClass, desc } = isObject(error) ? error : {};
  if (typeof qmpClass !== 'string' || typeof desc !== 'string') {
    throw new WireError('an error without class or words');
  }
  // QEMU leaves the id out where it could not read what was sent.
  if (!Object.hasOwn(value, 'id')) throw new WireError(`an error about no command: ${desc}`);
  return { kind: 'error', id: idOf(value), qmpClass, desc };
}
