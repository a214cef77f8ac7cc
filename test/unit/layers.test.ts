import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import ts from 'typescript';
import { describe, expect, test } from 'vitest';
import { repository } from '../support/processes.js';

/** From the leaves up. A module imports only from lines above its own, types included. */
const LAYERS = [
  ['types', 'mapped'],
  ['errors'],
  ['range', 'range-list', 'range-queue', 'units', 'extent'],
  ['align', 'read-ahead', 'extent-iterator', 'page-builder', 'secret'],
  ['nbd/abort-groups', 'nbd/errors', 'nbd/protocol', 'nbd/queue'],
  ['nbd/uri', 'nbd/inbox', 'nbd/replies'],
  ['nbd/transport', 'nbd/reply-parser', 'nbd/status-join'],
  ['nbd/handshake', 'nbd/connection'],
  ['nbd/dial'],
  ['nbd/client'],
  ['nbd/status-stream'],
  ['native'],
  ['outcomes'],
  ['descriptor', 'throttle', 'pace', 'open-options', 'qcow2/errors'],
  ['controls'],
  ['qmp/wire', 'qmp/errors'],
  ['qmp/limits', 'qmp/message', 'qmp/commands', 'qmp/pending'],
  ['qmp/schema', 'qmp/events', 'qmp/transport'],
  ['qmp/abilities'],
  ['qmp/client'],
  ['qmp/job-sample', 'qmp/job-devices'],
  ['qmp/job-control'],
  ['qmp/block-job'],
  ['qmp/block-jobs'],
  ['users', 'format', 'filesystem'],
  ['exclusive', 'extent-source', 'probe'],
  ['qcow2/data-file', 'qcow2/tables'],
  ['qcow2/extents', 'qcow2/needs', 'qcow2/backed-extents'],
  ['liveness', 'export-extents', 'chain/facts', 'chain/errors'],
  ['chain/qcow2', 'chain/qed', 'chain/vmdk', 'chain/name'],
  ['chain/header'],
  ['chain/served'],
  ['chain/chain'],
  ['chain/places'],
  ['file-hold', 'device-hold'],
  ['qemu/errors', 'qemu/graph', 'qemu/owner', 'qemu/listener'],
  ['qemu/disks', 'qemu/nbd-server', 'qemu/nbd-extents', 'qemu/daemon-process'],
  ['qemu/node-export', 'qemu/host-file', 'qemu/iothread', 'qemu/daemon-folder'],
  ['qemu/storage-daemon'],
  ['qemu/chain-nodes'],
  ['qemu/rest-engine'],
  ['qemu/rest-source'],
  ['routes/route'],
  ['routes/kernel-call', 'routes/zero-parts', 'routes/hold-file'],
  ['routes/zero-writer'],
  ['qcow2/hold'],
  ['routes/fallocate', 'routes/unshare', 'routes/zero-write', 'routes/device', 'routes/populate', 'routes/nbd-write'],
  ['routes/stream'],
  ['routes/nbd-touch', 'qemu/rest-route', 'qemu/stored-source', 'qemu/stored-formats'],
  ['qemu/backing'],
  ['routes/index'],
  ['kinds/kind'],
  ['kinds/file', 'kinds/block', 'kinds/guest', 'kinds/qcow2', 'kinds/nbd', 'kinds/stored'],
  ['kinds/index'],
  ['plan'],
  ['space'],
  ['qcow2/room'],
  ['qcow2/allocation', 'qcow2/host-fill'],
  ['routes/qcow2'],
  ['pass'],
  ['target'],
  ['job-image'],
  ['job'],
  ['image'],
  ['file-image', 'nbd-image'],
  ['qcow2/info'],
  ['qcow2/image'],
  ['qemu/host-reserve', 'qemu/stored-file'],
  ['qemu/guest-image', 'qemu/stored-image'],
  ['open'],
  ['index'],
  ['cli/options', 'cli/output', 'cli/buckets', 'cli/table'],
  ['cli/targets'],
  ['cli/bar', 'cli/svg', 'cli/progress', 'cli/monitor'],
  ['cli/info', 'cli/map', 'cli/allocate', 'cli/verify', 'cli/jobs', 'cli/steer'],
  ['cli/main'],
];
const rankOf = new Map(LAYERS.flatMap((names, rank) => names.map((name) => [name, rank] as const)));

const MOST_LINES = 400;
const MOST_FUNCTION_LINES = 60;

function filesUnder(folder: string, endings: RegExp): string[] {
  return readdirSync(join(repository, folder), { recursive: true, encoding: 'utf8' })
    .filter((name) => endings.test(name) && !name.startsWith('test/'))
    .map((name) => join(folder, name))
    .sort();
}

const textOf = (file: string) => readFileSync(join(repository, file), 'utf8');

const typescript = filesUnder('lib', /\.ts$/);
const cpp = filesUnder('native', /\.(cc|h)$/);
const moduleOf = (file: string) => relative('lib', file).replace(/\.(ts|js)$/, '');

function importsOf(file: string): string[] {
  const text = textOf(file);
  const found = [...text.matchAll(/\bfrom '(\.[^']+)'|\bimport\(?\s*'(\.[^']+)'/g)];
  return found.map(([, from, dynamic]) => moduleOf(join(dirname(file), from ?? dynamic ?? '')));
}

describe('imports', () => {
  test('have a place in the layers for every module', () => {
    expect(typescript.map(moduleOf).sort()).toEqual([...rankOf.keys()].sort());
  });

  test.each(typescript)('of %s go down only', (file) => {
    const own = rankOf.get(moduleOf(file)) ?? -1;
    const upward = importsOf(file).filter((name) => (rankOf.get(name) ?? Infinity) >= own);
    expect(upward).toEqual([]);
  });

  test('are found in the sources at all', () => {
    expect(importsOf('lib/job.ts')).toEqual(expect.arrayContaining(['errors', 'pass', 'job-image']));
    expect(importsOf('lib/cli/main.ts')).toContain('cli/map');
  });
});

describe('the command line alone', () => {
  test.each([
    ['ends the process', /\bprocess\s*\.\s*(exit|exitCode|abort|kill)\b/],
    ['listens to signals', /\bprocess\s*\.\s*(on|once|addListener|prependListener)\s*\(/],
    ['writes to stdout and stderr', /\bprocess\s*\.\s*(stdout|stderr)\b|\bconsole\s*\./],
  ])('%s', (_, pattern) => {
    const users = typescript.filter((file) => pattern.test(textOf(file)));
    expect(users.filter((file) => !file.startsWith('lib/cli/'))).toEqual([]);
  });
});

describe('sizes', () => {
  test(`no source has more than ${MOST_LINES} lines`, () => {
    const long = [...typescript, ...cpp].filter((file) => textOf(file).trimEnd().split('\n').length > MOST_LINES);
    expect(long).toEqual([]);
  });

  test(`no function has more than ${MOST_FUNCTION_LINES} lines`, () => {
    const functions = [...typescript.flatMap(functionsOf), ...cpp.flatMap(blocksOf)];
    expect(functions.length).toBeGreaterThan(300);
    expect(functions.filter(({ lines }) => lines > MOST_FUNCTION_LINES)).toEqual([]);
  });
});

interface Block {
  place: string;
  lines: number;
}

function functionsOf(file: string): Block[] {
  const source = ts.createSourceFile(file, textOf(file), ts.ScriptTarget.Latest);
  const lineOf = (position: number) => source.getLineAndCharacterOfPosition(position).line + 1;
  const found: Block[] = [];
  const visit = (node: ts.Node): void => {
    if (ts.isFunctionLike(node)) {
      const first = lineOf(node.getStart(source));
      found.push({ place: `${file}:${first}`, lines: lineOf(node.end) - first + 1 });
    }
    ts.forEachChild(node, visit);
  };
  visit(source);
  return found;
}

/** Blocks of C++ that may be functions, by their indentation. */
function blocksOf(file: string): Block[] {
  const lines = textOf(file).split('\n');
  return lines.flatMap((line, i) => {
    const opened = /^(\s*)(?!namespace|class|struct|union|enum|extern)\S.*\{$/.exec(line);
    if (!opened) return [];
    const end = lines.findIndex((later, j) => j > i && later.startsWith(`${opened[1]}}`));
    return [{ place: `${file}:${i + 1}`, lines: end - i + 1 }];
  });
}

describe('calls that could take bytes from a guest', () => {
  test.each(['posix_fallocate', 'FALLOC_FL_PUNCH_HOLE', 'FALLOC_FL_COLLAPSE_RANGE', 'FALLOC_FL_INSERT_RANGE', 'BLKDISCARD', 'truncate'])(
    '%s is nowhere in the sources',
    (name) => {
      const call = new RegExp(name === 'truncate' ? '\\bf?truncate(64|Sync)?\\s*\\(' : name);
      expect([...typescript, ...cpp].filter((file) => call.test(textOf(file)))).toEqual([]);
    },
  );
});
