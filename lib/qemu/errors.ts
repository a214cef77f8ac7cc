/** The errors of disks that a QEMU has open. */
import { build } from '../errors.js';
import { printable } from '../qmp/errors.js';

const many = (names: readonly string[]) =>
  names.length === 0 ? 'none' : names.map((name) => printable(name)).join(', ');

/** What a program said before it ended. */
const words = (said: string) => (said === '' ? '' : `: ${printable(said)}`);

export const diskErrors = {
  unknown: (monitor: string, name: string, known: readonly string[]) =>
    build(
      'UNKNOWN_DEVICE',
      `QEMU has no disk ${JSON.stringify(printable(name))}; there are: ${many(known)}`,
      'name one of them: by the id of its -device, its -drive, its node, or its QOM path',
      { path: monitor },
    ),

  unnamed: (monitor: string, known: readonly string[]) =>
    build(
      'USAGE',
      `no --device says which disk of the QEMU is meant; there are: ${many(known)}`,
      'name one, or several; thicken info --qmp SOCKET tells more of them',
      { path: monitor },
    ),

  empty: (path: string) =>
    build('UNSUPPORTED', 'the device has no disk in it', 'insert one', { path }),

  readOnly: (path: string) =>
    build('UNSUPPORTED', 'QEMU has the disk open for reading only', 'allocate it at rest', { path }),

  nbdBusy: (path: string) =>
    build(
      'NBD_BUSY',
      'QEMU’s NBD server runs already, and no command tells its address',
      'give its address with --nbd URI, or stop it',
      { path },
    ),

  noServer: (path: string, why: string) =>
    build(
      'NBD_BUSY',
      `the NBD server at the address of --nbd does not serve this QEMU’s disk (${printable(why)})`,
      'give the address of the server that runs in this QEMU, with what its clients need',
      { path },
    ),

  notRunning: (path: string) =>
    build('NBD_BUSY', 'no NBD server runs in this QEMU', 'leave --nbd out: thicken starts one', { path }),

  exportGone: (path: string, cause: unknown) =>
    build(
      'NBD_LOST',
      'QEMU has closed the export that thicken had added; somebody else may have removed it',
      'run it again: it continues where it stopped',
      { path, cause },
    ),

  stillServed: (path: string, id: string) =>
    build(
      'NBD_BUSY',
      `the export ${JSON.stringify(printable(id))} of a run that was cut short waits for the storage below the disk`,
      'see to the backing file’s storage or server, and run it again',
      { path },
    ),

  unsupportedHere: (path: string, what: string) =>
    build('UNSUPPORTED', what, 'allocate the disk at rest, or update QEMU', { path }),

  notTheFile: (path: string, file: string) =>
    build(
      'CHANGED',
      `${JSON.stringify(printable(file))} is not the file that QEMU has open`,
      'run thicken where QEMU runs (the same machine, the same mounts)',
      { path },
    ),

  cannotFind: (path: string, why: string) =>
    build(
      'UNSUPPORTED',
      `the file that QEMU has open can't be found from here (${why})`,
      'run thicken as root where QEMU runs, and connect by QEMU’s own UNIX socket',
      { path },
    ),

  hasSnapshots: (path: string, count: number) =>
    build(
      'HAS_SNAPSHOTS',
      `the image has ${count} internal snapshots, which would lose the content of the backing file`,
      'delete them, or leave --drop-backing and --route stream out',
      { path },
    ),

  shortBacking: (path: string) =>
    build(
      'RANGE',
      'the backing file can only be dropped when the whole disk is populated',
      'leave --offset and --length out',
      { path },
    ),

  nothingToStream: (path: string) =>
    build('USAGE', 'the disk has no backing file to be freed from', 'leave --detach out', { path }),

  noDaemon: (program: string) =>
    build(
      'DAEMON_MISSING',
      `${program} is not installed, or not on the PATH: QEMU’s formats and backing files are dealt with by it`,
      'install it: on Debian and Ubuntu the package qemu-system-common, on Fedora qemu-img',
    ),

  daemonFailed: (how: string, said: string, cause?: unknown) =>
    build(
      'DAEMON_FAILED',
      `qemu-storage-daemon did not start: it ended ${how}${words(said)}`,
      'see its words for why',
      { cause },
    ),

  daemonLost: (path: string, how: string, said: string, cause?: unknown) =>
    build(
      'DAEMON_LOST',
      `qemu-storage-daemon, which worked on the image, ended ${how}${words(said)}`,
      'run it again: it continues where it stopped',
      { path, cause },
    ),

  layerRefused: (path: string, depth: number, said: string, cause: unknown) =>
    build(
      depth === 0 ? 'QEMU_REFUSED' : 'BACKING_MISSING',
      `QEMU does not open ${depth === 0 ? 'the image' : 'a layer below the image'}${words(said)}`,
      depth === 0 ? 'see QEMU’s words for why' : 'see to that layer’s storage or server, and run it again',
      { path, cause },
    ),

  keepsBacking: (path: string) =>
    build(
      'UNSUPPORTED',
      'QEMU can’t take the backing file out of a VMDK image',
      'leave --drop-backing out: the image is populated all the same, and reads nothing from it any more',
      { path },
    ),

  cannotThicken: (path: string, what: string) =>
    build('UNSUPPORTED', `${what} can't be given storage`, 'convert it to qcow2 or raw (qemu-img convert)', { path }),

  smallRequests: (most: number) =>
    build(
      'UNSUPPORTED',
      `a server below takes ${most} bytes at most, and by so few QEMU can't copy a part of a cluster`,
      'have the server take more at a time, or make a copy (qemu-img convert)',
    ),

  detachedOnly: (path: string) =>
    build('USAGE', 'only a stream of the whole disk can be detached', 'add --route stream', { path }),
};
