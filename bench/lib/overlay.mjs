/** A qcow2 image over a template, all of it still to be copied. */
import { execFileSync, spawnSync } from 'node:child_process';
import { closeSync, fsyncSync, openSync, rmSync, writeSync } from 'node:fs';
import { randomBytes } from 'node:crypto';

const MiB = 2 ** 20;

/** Data in every cluster, none of it equal to its neighbour. */
export function makeTemplate(path, size) {
  const content = randomBytes(8 * MiB);
  const file = openSync(path, 'w');
  for (let at = 0; at < size; at += content.length) {
    content.writeDoubleLE(at);
    writeSync(file, content, 0, Math.min(content.length, size - at));
  }
  fsyncSync(file);
  closeSync(file);
}

/** `backing`: a file's name, or an NBD URI. */
export function makeOverlay(path, backing, size) {
  rmSync(path, { force: true });
  execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', backing, '-F', 'raw', path, String(size)]);
  // What the image before this one left to be done must not be charged to the trial.
  execFileSync('sync');
}

/** All of it mapped in the image itself, and its tables in order. */
export function mustBePopulated(path, size) {
  execFileSync('qemu-img', ['check', '-q', '-f', 'qcow2', path]);
  const json = execFileSync('qemu-img', ['map', '--output=json', '-f', 'qcow2', path], { maxBuffer: 64 * MiB });
  const own = JSON.parse(json).filter(({ depth, data }) => depth === 0 && data);
  const mapped = own.reduce((sum, { length }) => sum + length, 0);
  if (mapped !== size) throw new Error(`${path}: only ${mapped} of ${size} bytes are populated`);
}

/** What the storage takes for as many bytes, read and written. */
export function bareCopy({ image, template }) {
  const args = ['bs=1M', 'iflag=direct', 'oflag=direct', 'conv=fsync', 'status=none'];
  return {
    name: 'dd, O_DIRECT, fsync',
    command: 'dd',
    args: [`if=${template}`, `of=${image}`, ...args],
    before: () => rmSync(image, { force: true }),
  };
}

/**
 * The node `disk` of an overlay, past the page cache. `template` is the node below; without it, it
 * is what the image names, since QEMU refuses another server than that.
 */
export function overlayNode(path, template) {
  return {
    driver: 'qcow2',
    'node-name': 'disk',
    cache: { direct: true },
    file: fileNode(path),
    ...(template && { backing: { driver: 'raw', cache: { direct: true }, file: template } }),
  };
}

export function fileNode(filename) {
  return { driver: 'file', filename, aio: asynchronousIo(filename), cache: { direct: true } };
}

let known;

/** io_uring, unless QEMU or the kernel lacks it. */
export function asynchronousIo(file) {
  const image = `driver=file,filename=${file},aio=io_uring,cache.direct=on`;
  const args = ['-r', '-c', 'read 0 4k', '--image-opts', image];
  known ??= spawnSync('qemu-io', args, { stdio: 'ignore' }).status === 0 ? 'io_uring' : 'threads';
  return known;
}
