/** The errors of backing chains: which image names what, and why it is not opened. */
import { build, type ErrorDetails } from '../errors.js';

/** More would be no name that anybody gave. */
const MOST_CHARACTERS = 200;

/** A name out of an image, on one line and of bounded length. */
export function quoted(name: string): string {
  const start = name.slice(0, MOST_CHARACTERS).replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]+/gu, '�');
  return JSON.stringify(name.length > MOST_CHARACTERS ? `${start}…` : start);
}

const REBASE = 'qemu-img rebase -u -b NAME -F FORMAT';

export const chainErrors = {
  damaged: (path: string, format: string, what: string) =>
    build('DAMAGED', `the header is not that of a sound ${format} image: ${what}`, `see qemu-img check -f ${format}`, {
      path,
    }),

  namesFiles: (path: string, what: string) =>
    build('BACKING_REFUSED', `${what} decides what other files are opened`, 'convert the image to qcow2', { path }),

  noFormat: (path: string, backing: string) =>
    build(
      'BACKING_FORMAT',
      `the format of the backing file ${quoted(backing)} is not recorded, and guests can write what a probe would find`,
      `state it by --backing-format, or record it: ${REBASE}`,
      { path },
    ),

  unsupported: (path: string, format: string, why: string) =>
    build('UNSUPPORTED', `format ${quoted(format)} can't be part of a backing chain here: ${why}`, 'convert it to qcow2 or raw', {
      path,
    }),

  secretWanted: (path: string) =>
    build(
      'SECRET_REQUIRED',
      'the key of the encrypted image is not given, and its content can’t be copied without',
      'give it by --secret file=PATH or --secret fd=N',
      { path },
    ),

  secretWrong: (path: string, said: string, cause: unknown) =>
    build(
      'SECRET_WRONG',
      `the key of --secret does not unlock the encrypted image (QEMU says: ${said})`,
      'give the right one: its bytes count as they are, a newline at the end too; nothing has been changed',
      { path, cause },
    ),

  certificatesWanted: (path: string, backing: string) =>
    build(
      'BACKING_REFUSED',
      `the server of the backing file ${quoted(backing)} is to be spoken to by TLS, and no certificates are given`,
      'name their folder by --tls-certificates',
      { path },
    ),

  unserved: (path: string, said: string, cause: unknown) =>
    build('BACKING_MISSING', `the layer can't be read from its server (${said})`, 'see to the server, and run it again', {
      path,
      cause,
    }),

  refused: (path: string, backing: string, why: string) =>
    build(
      'BACKING_REFUSED',
      `the backing file ${quoted(backing)} is not opened: ${why}`,
      `name a file or an nbd:// server instead: ${REBASE}`,
      { path },
    ),

  missing: (path: string, backing: string, why: string, details: ErrorDetails) =>
    build('BACKING_MISSING', `the backing file ${quoted(backing)} can't be opened (${why})`, `bring it back, or name another: ${REBASE}`, {
      ...details,
      path,
    }),

  loop: (path: string, backing: string) =>
    build('BACKING_LOOP', `the backing file ${quoted(backing)} is an image that lies on this one`, `name the right one: ${REBASE}`, {
      path,
    }),

  tooDeep: (path: string, most: number) =>
    build('BACKING_DEPTH', `more than ${most} layers lie below the image`, 'shorten the chain: qemu-img commit, qemu-img rebase', {
      path,
    }),
};
