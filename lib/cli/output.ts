/** What the commands print, and where. */
import { once } from 'node:events';
import { styleText } from 'node:util';
import { errorJson, type ThickenError } from '../errors.js';

let lost = false;

/** From now on nothing is printed: stdout takes no more. */
export function stopPrinting(): void {
  lost = true;
}

/** Writes to stdout, and waits where the reader is slower. */
export async function print(text: string): Promise<void> {
  if (lost || process.stdout.write(text)) return;
  // An error of the stream ends the wait; what it means is for those who listen to it to say.
  await once(process.stdout, 'drain').catch(() => undefined);
}

let documentBegun = false;

/** Prints a part of the one JSON document of a run. */
export function printJsonPart(text: string): Promise<void> {
  documentBegun = true;
  return print(text);
}

export function printJson(value: unknown): Promise<void> {
  return printJsonPart(`${escaped(JSON.stringify(value))}\n`);
}

/** JSON escapes only the first 32 of the control characters; a terminal obeys the others too. */
function escaped(json: string): string {
  return json.replace(/[\u007f-\u009f]/g, (character) => `\\u00${character.charCodeAt(0).toString(16)}`);
}

/** The error as the run's JSON document, unless a document was cut short by it. */
export async function printJsonError(error: ThickenError): Promise<void> {
  if (!documentBegun) await printJson({ error: errorJson(error) });
}

export function warn(warnings: readonly string[]): void {
  for (const warning of warnings) process.stderr.write(`thicken: warning: ${warning}\n`);
}

/** Text for a terminal, on one line, whatever a file name may hold. */
export function plain(text: string): string {
  // eslint-disable-next-line no-control-regex -- they are what must not reach a terminal
  return text.replace(/[\u0000-\u001f\u007f-\u009f]+/g, ' ');
}

export function printError(error: ThickenError): void {
  process.stderr.write(`thicken: ${error.code}: ${plain(error.message)}\n`);
}

/** The same as a line of JSON, among those of the progress. */
export function printErrorLine(error: ThickenError): void {
  process.stderr.write(`${JSON.stringify({ error: errorJson(error) })}\n`);
}

const USAGE_CODES = new Set(['USAGE', 'RANGE', 'FORMAT_REQUIRED', 'SECRET_REQUIRED']);

/** The exit status that the contract gives to an error. */
export function exitStatus(error: ThickenError): number {
  if (USAGE_CODES.has(error.code)) return 2;
  if (error.code === 'IN_USE') return 4;
  if (error.code === 'CANCELLED') return 130;
  return 1;
}

type Style = Parameters<typeof styleText>[0];

/** `text` in a style, where stdout is a terminal that wants it (NO_COLOR, FORCE_COLOR). */
export function styled(style: Style, text: string): string {
  // Asked again, Node would let the variable CI say no on a terminal.
  return wantsColour() ? styleText(style, text, { validateStream: false }) : text;
}

function wantsColour(): boolean {
  if (process.env['NO_COLOR']) return false;
  if (process.env['FORCE_COLOR']) return process.env['FORCE_COLOR'] !== '0';
  return process.stdout.isTTY === true && process.env['TERM'] !== 'dumb';
}
