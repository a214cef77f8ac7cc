/**
 * The commands that thicken uses, as QEMU 7.2 describes them (qapi/*.json): what they take, and of
 * what they return the part that is used. Sizes and offsets are bytes, speeds bytes a second. A
 * peer may break its word: whoever relies on a reply's shape checks it.
 */
import type { JsonObject } from './wire.js';

export type NoArguments = Record<never, never>;
export type Nothing = NoArguments;

export type OnError = 'report' | 'ignore' | 'enospc' | 'stop';
export type JobStatus =
  | 'undefined'
  | 'created'
  | 'running'
  | 'paused'
  | 'ready'
  | 'standby'
  | 'waiting'
  | 'pending'
  | 'aborting'
  | 'concluded'
  | 'null';
export type IoStatus = 'ok' | 'failed' | 'nospace';

export interface JobInfo {
  id: string;
  /** `stream`, `commit`, `mirror`, `backup`, `create`, … */
  type: string;
  status: JobStatus;
  'current-progress': number;
  'total-progress': number;
  error?: string;
}

export interface BlockJobInfo {
  type: string;
  /** The job's id; the device's name only where none was given. */
  device: string;
  len: number;
  offset: number;
  /** The limit; 0 for none. */
  speed: number;
  busy: boolean;
  paused: boolean;
  'io-status': IoStatus;
  ready: boolean;
  status: JobStatus;
  'auto-finalize': boolean;
  'auto-dismiss': boolean;
  error?: string;
}

export interface ImageFacts {
  filename: string;
  format: string;
  'virtual-size': number;
  'actual-size'?: number;
  'dirty-flag'?: boolean;
  'cluster-size'?: number;
  encrypted?: boolean;
  'backing-filename'?: string;
  'full-backing-filename'?: string;
  'backing-filename-format'?: string;
  /** Not with `flat`. */
  'backing-image'?: ImageFacts;
  snapshots?: JsonObject[];
  'format-specific'?: { type: string; data: JsonObject };
}

export interface BlockNode {
  file: string;
  'node-name'?: string;
  ro: boolean;
  drv: string;
  backing_file?: string;
  backing_file_depth: number;
  encrypted: boolean;
  detect_zeroes: string;
  cache?: { writeback: boolean; direct: boolean; 'no-flush': boolean };
  image: ImageFacts;
}

export interface BlockDevice {
  /** Empty where the device was made with -blockdev. */
  device: string;
  /** The path of the device in QOM. */
  qdev?: string;
  type: string;
  removable: boolean;
  locked: boolean;
  inserted?: BlockNode;
  'io-status'?: IoStatus;
}

export type SocketAddress =
  | { type: 'unix'; path: string }
  | { type: 'inet'; host: string; port: string }
  | { type: 'fd'; str: string };

export interface ExportArguments {
  type: 'nbd';
  id: string;
  'node-name': string;
  /** What clients ask for; the node's name if absent. */
  name?: string;
  description?: string;
  writable?: boolean;
  writethrough?: boolean;
  bitmaps?: string[];
  'allocation-depth'?: boolean;
}

/** What a block job along a backing chain is started with. */
interface ChainJobArguments {
  'job-id': string;
  /** A device, or a node. */
  device: string;
  'base-node'?: string;
  'backing-file'?: string;
  speed?: number;
  'on-error'?: OnError;
  'filter-node-name'?: string;
  'auto-finalize'?: boolean;
  'auto-dismiss'?: boolean;
}

export interface StreamArguments extends ChainJobArguments {
  base?: string;
  bottom?: string;
}

export interface CommitArguments extends ChainJobArguments {
  'top-node'?: string;
}

interface Call<Arguments, Returns> {
  arguments: Arguments;
  returns: Returns;
}

interface ByDevice {
  /** The job's id. */
  device: string;
}

interface ById {
  id: string;
}

/** A node as blockdev-add takes it. */
export type NodeOptions = JsonObject & { driver: string; 'node-name': string };

export interface QmpCommands {
  qmp_capabilities: Call<{ enable?: string[] }, Nothing>;
  'query-version': Call<
    NoArguments,
    { qemu: { major: number; minor: number; micro: number }; package: string }
  >;
  'query-name': Call<NoArguments, { name?: string }>;
  'query-status': Call<NoArguments, { running: boolean; status: string }>;
  'query-commands': Call<NoArguments, { name: string }[]>;
  'query-qmp-schema': Call<NoArguments, JsonObject[]>;
  'query-block': Call<NoArguments, BlockDevice[]>;
  'query-named-block-nodes': Call<{ flat?: boolean }, BlockNode[]>;
  'query-block-exports': Call<
    NoArguments,
    { id: string; type: string; 'node-name': string; 'shutting-down': boolean }[]
  >;
  'query-jobs': Call<NoArguments, JobInfo[]>;
  'query-block-jobs': Call<NoArguments, BlockJobInfo[]>;
  'query-fdsets': Call<
    NoArguments,
    { 'fdset-id': number; fds: { fd: number; opaque?: string }[] }[]
  >;
  'block-stream': Call<StreamArguments, Nothing>;
  'block-commit': Call<CommitArguments, Nothing>;
  'block-job-set-speed': Call<ByDevice & { speed: number }, Nothing>;
  'block-job-pause': Call<ByDevice, Nothing>;
  'block-job-resume': Call<ByDevice, Nothing>;
  'block-job-cancel': Call<ByDevice & { force?: boolean }, Nothing>;
  'block-job-complete': Call<ByDevice, Nothing>;
  'job-pause': Call<ById, Nothing>;
  'job-resume': Call<ById, Nothing>;
  /** Always by force: a job that is ready is undone, not completed. */
  'job-cancel': Call<ById, Nothing>;
  'job-complete': Call<ById, Nothing>;
  'job-finalize': Call<ById, Nothing>;
  'job-dismiss': Call<ById, Nothing>;
  'block-export-add': Call<ExportArguments, Nothing>;
  'block-export-del': Call<ById & { mode?: 'safe' | 'hard' }, Nothing>;
  'nbd-server-start': Call<
    { addr: { type: string; data: JsonObject }; 'max-connections'?: number },
    Nothing
  >;
  'nbd-server-stop': Call<NoArguments, Nothing>;
  'blockdev-add': Call<NodeOptions, Nothing>;
  'blockdev-del': Call<{ 'node-name': string }, Nothing>;
  'blockdev-reopen': Call<{ options: NodeOptions[] }, Nothing>;
  'blockdev-snapshot': Call<{ node: string; overlay: string }, Nothing>;
  'change-backing-file': Call<
    { device: string; 'image-node-name': string; 'backing-file': string },
    Nothing
  >;
  'object-add': Call<
    | { 'qom-type': 'secret'; id: string; format: 'base64'; data: string }
    | { 'qom-type': 'tls-creds-x509'; id: string; endpoint: 'client'; dir: string; 'verify-peer': boolean },
    Nothing
  >;
  'object-del': Call<ById, Nothing>;
  'qom-get': Call<{ path: string; property: string }, unknown>;
  'qom-list': Call<{ path: string }, { name: string; type: string }[]>;
}

export type QmpCommandName = keyof QmpCommands;
export type ArgumentsOf<C extends QmpCommandName> = QmpCommands[C]['arguments'];
export type ReturnOf<C extends QmpCommandName> = QmpCommands[C]['returns'];

/** `args` may be left out where nothing in them is needed. */
export type CallParameters<C extends QmpCommandName, Options> =
  NoArguments extends ArgumentsOf<C>
    ? [args?: ArgumentsOf<C>, options?: Options]
    : [args: ArgumentsOf<C>, options?: Options];
