import { printable } from '../qmp/errors.js';
import { listJobs, type JobEntry } from '../qmp/job-control.js';
import { formatBytes, formatSeconds } from '../units.js';
import { onMonitor } from './monitor.js';
import type { MonitorOptions } from './options.js';
import { print, printJson } from './output.js';
import { renderTable, type Column } from './table.js';

export async function jobs(
  _: string[],
  options: MonitorOptions,
  signal: AbortSignal,
): Promise<number> {
  const entries = await onMonitor(options.qmp, signal, (client) => listJobs(client, { signal }));
  if (options.json) await printJson(entries);
  else await print(await renderJobs(entries));
  return 0;
}

const COLUMNS: Column[] = [
  { head: 'id' },
  { head: 'type' },
  { head: 'device' },
  { head: 'status' },
  { head: 'done', align: 'right' },
  { head: 'of', align: 'right' },
  { head: 'limit', align: 'right' },
  { head: 'left', align: 'right' },
];
const UNKNOWN = '-';

export async function renderJobs(entries: JobEntry[]): Promise<string> {
  if (entries.length === 0) return 'no jobs\n';
  return renderTable(COLUMNS, entries.map(rowOf));
}

function rowOf(entry: JobEntry): string[] {
  const { id, type, device, status, total, speed, secondsLeft } = entry;
  return [
    printable(id),
    printable(type),
    device === null ? UNKNOWN : printable(device),
    printable(status),
    percentage(entry),
    formatBytes(total),
    speed === null ? 'none' : `${formatBytes(speed)}/s`,
    secondsLeft === null ? UNKNOWN : formatSeconds(secondsLeft),
  ];
}

/** Rounded down: what is not done must not look as if it were. */
function percentage({ position, total }: JobEntry): string {
  if (!(total > 0)) return UNKNOWN;
  const tenths = Math.floor((position / total) * 1000);
  return `${(Math.min(1000, Math.max(0, tenths)) / 10).toFixed(1)}%`;
}
