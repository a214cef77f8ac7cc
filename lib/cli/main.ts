#!/usr/bin/env node
/** The command line; the only place that touches the exit status and signals. */
import { readFileSync } from 'node:fs';
import { Command, CommanderError, Option } from 'commander';
import {
  errors,
  isRawSystemError,
  systemError,
  toThickenError,
  usageError,
  type ThickenError,
} from '../errors.js';
import {
  addCommon,
  addQemu,
  addLevel,
  addMonitor,
  addRange,
  parseKeepFree,
  parseRate,
  ROUTE_NAMES,
  type MonitorOptions,
} from './options.js';
import {
  exitStatus,
  print,
  printError,
  printErrorLine,
  printJsonError,
  stopPrinting,
} from './output.js';

/** Runs a command; its value is the exit status. */
type Action<Options> = (
  targets: string[],
  options: Options,
  signal: AbortSignal,
) => Promise<number>;

const cancelled = new AbortController();
/** In which what is under way has ended, unless the storage hangs. */
const PATIENCE_MS = 1_000;

/** Commands that take the signal themselves, and say how far they came. */
const ENDS_BY_ITSELF = new Set(['allocate', 'jobs', 'pause', 'resume', 'cancel', 'set-speed']);

function version(): string {
  const manifest = readFileSync(new URL('../../package.json', import.meta.url), 'utf8');
  return (JSON.parse(manifest) as { version: string }).version;
}

/** Commands are loaded when they run: the others would only slow down the start. */
function action<Options>(load: () => Promise<Action<Options>>) {
  return async (target: string | string[] | undefined, options: Options) => {
    const run = await load();
    process.exitCode = await run([target ?? []].flat(), options, cancelled.signal);
  };
}

/** Jobs of QEMU's, whoever started them. */
function addJobCommands(program: Command): void {
  const list = action(async () => (await import('./jobs.js')).jobs);
  addMonitor(program.command('jobs'))
    .description('QEMU’s block jobs, and how far they are')
    .action((options: MonitorOptions) => list(undefined, options));

  addMonitor(program.command('pause [job]'))
    .description('hold a job, after its request in flight')
    .action(action(async () => (await import('./steer.js')).pause));

  addMonitor(program.command('resume [job]'))
    .description('let a job go on, also one that an error has paused')
    .action(action(async () => (await import('./steer.js')).resume));

  addMonitor(program.command('cancel [job]'))
    .description('end a job, and wait until it is gone')
    .action(action(async () => (await import('./steer.js')).cancel));

  // Variadic, since commander takes no optional argument before one that must be given.
  addMonitor(program.command('set-speed').argument('<rate...>'))
    .usage('[options] [job] <rate>')
    .description('limit a job to so many bytes a second (50M), or to none')
    .action(action(async () => (await import('./steer.js')).setSpeed));
}

function build(): Command {
  const program = new Command('thicken')
    .description('Allocates the missing regions of thin disk images, in place.')
    .version(version(), '--version')
    .exitOverride()
    .configureOutput({ writeErr: () => undefined });

  addQemu(addCommon(program.command('info [target]')))
    .description('format, sizes, what is allocated and missing, locks, file-system abilities')
    .action(action(async () => (await import('./info.js')).info));

  addQemu(addRange(addCommon(program.command('map [target]'))))
    .description('which regions have storage behind them')
    .addOption(
      new Option('--output <how>', 'table, json, bar or svg')
        .choices(['table', 'json', 'bar', 'svg'])
        .default('table'),
    )
    .action(action(async () => (await import('./map.js')).map));

  addQemu(addLevel(addRange(addCommon(program.command('allocate [targets...]')))))
    .description('give storage to what lacks it; data stays as it is')
    .option('--dry-run', 'print the plan; change nothing')
    .option('--speed <rate>', 'most bytes a second', parseRate('speed'))
    .option('--iops <n>', 'most requests a second', parseRate('iops'))
    .option('--keep-free <amount>', 'space to leave free: a size or a percentage', parseKeepFree)
    .addOption(
      new Option('--progress <how>', 'auto, none or json')
        .choices(['auto', 'none', 'json'])
        .default('auto'),
    )
    .addOption(new Option('--route <route>', 'one mechanism only').choices(ROUTE_NAMES))
    .option('--drop-backing', 'end the dependence on the backing file')
    .option('--detach', 'leave a stream to QEMU, and print its job')
    .option('--exclusive', 'nothing else uses the image, on your word, where that can’t be told')
    .action(action(async () => (await import('./allocate.js')).allocate));

  addQemu(addLevel(addRange(addCommon(program.command('verify [target]')))))
    .description('exit 0 if every byte has the storage that the level promises, else 3')
    .action(action(async () => (await import('./verify.js')).verify));

  addJobCommands(program);

  for (const command of program.commands) command.exitOverride().copyInheritedSettings(program);
  return program;
}

/** Help and version were printed, and are no errors. */
function isPrinted(error: unknown): boolean {
  return error instanceof CommanderError && error.exitCode === 0;
}

function translate(error: unknown): ThickenError {
  if (!(error instanceof CommanderError)) return toThickenError(error);
  if (error.code === 'commander.help') return usageError('no command', 'see thicken --help');
  const message = error.message.replace(/^error: /, '').replace(/\.?\s*$/, '');
  return usageError(message.replace(/\s*\n\s*/g, ' '), 'see thicken --help');
}

function handleSignals(args: string[]): void {
  for (const signal of ['SIGINT', 'SIGTERM'] as const) {
    process.on(signal, () => {
      // A second signal is meant: what is in flight is bounded, and safe to be cut short.
      if (cancelled.signal.aborted) process.exit(130);
      cancelled.abort();
      if (process.stderr.isTTY && !tellsInLines(args)) setTimeout(tellOfWaiting, PATIENCE_MS).unref();
    });
  }
}

/** A template's server that hangs may be waited for until its time is over. */
function tellOfWaiting(): void {
  process.stderr.write('thicken: waits for what is under way; once more leaves at once\n');
}

/** Whoever stops listening ends no work; but a map is nothing beside what it prints. */
function handleLostOutput(lost: () => void): void {
  process.stdout.on('error', (error: NodeJS.ErrnoException) => {
    stopPrinting();
    // A reader that has seen enough (thicken map … | head) is no error.
    if (error.code !== 'EPIPE') failAtExit(error);
    lost();
  });
  // What can't be told there can't be told anywhere.
  process.stderr.on('error', () => undefined);
}

let failing = false;

function failAtExit(error: NodeJS.ErrnoException): void {
  if (failing) return;
  failing = true;
  printError(isRawSystemError(error) ? systemError(error, 'stdout') : toThickenError(error));
  process.once('exit', () => (process.exitCode ||= 1));
}

/** Whether stderr carries JSON alone, a line for each. */
function tellsInLines(args: string[]): boolean {
  return args.includes('--progress=json') || args.some((arg, i) => `${arg} ${args[i + 1]}` === '--progress json');
}

function printFailure(failure: ThickenError, args: string[]): void {
  if (tellsInLines(args)) printErrorLine(failure);
  else printError(failure);
}

/** Nobody reads any more what a command prints. */
const ENOUGH = new Error('enough');

/** What was added to a QEMU goes first. */
async function leave(): Promise<void> {
  await (await import('./targets.js')).closeAll();
  process.exit();
}

async function main(args: string[]): Promise<void> {
  handleSignals(args);
  const unread = new Promise<never>((_, reject) => {
    handleLostOutput(() => args[0] === 'map' && reject(ENOUGH));
  });
  try {
    const aborted = new Promise<never>((_, reject) => {
      cancelled.signal.addEventListener('abort', () => {
        if (!ENDS_BY_ITSELF.has(args[0] ?? '')) reject(errors.cancelled(args[1] ?? ''));
      });
    });
    await Promise.race([build().parseAsync(args, { from: 'user' }), aborted, unread]);
  } catch (error) {
    if (isPrinted(error)) return;
    if (error === ENOUGH) return leave();
    const failure = translate(error);
    printFailure(failure, args);
    if (args.includes('--json')) await printJsonError(failure);
    process.exitCode = exitStatus(failure);
    if (failure.code !== 'CANCELLED') return;
    await print('');
    await leave();
  }
}

await main(process.argv.slice(2));
