/** Where the name of a backing file leads, as QEMU reads it (block.c), and what of it is refused. Pure. */
import { dirname } from 'node:path';
import { isNbdUri, parseNbdUri, type NbdUri } from '../nbd/uri.js';
import { chainErrors } from './errors.js';

export type Place = { kind: 'file'; path: string } | { kind: 'nbd'; uri: NbdUri; name: string };

/** PATH_MAX of linux/limits.h. */
const MOST_PATH = 4096;

/**
 * `name` as the image at `path` records it. Throws BACKING_REFUSED for all but files and NBD servers,
 * and for names that no person would give.
 */
export function placeOf(name: string, path: string): Place {
  const refuse = (why: string) => chainErrors.refused(path, name, why);
  if (/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/u.test(name)) throw refuse('its name has characters that are not to be seen');
  if (name === '' || Buffer.byteLength(name) > MOST_PATH) throw refuse('its name is empty or too long');
  if (name.startsWith('json:')) throw refuse('a json: name can say anything');
  const protocol = /^([^/:]*):/.exec(name)?.[1];
  if (protocol === undefined) return { kind: 'file', path: resolved(name, path) };
  if (protocol === 'file' && name.startsWith('file:/')) return { kind: 'file', path: name.slice('file:'.length) };
  if (protocol === 'nbd') return { kind: 'nbd', name, uri: legacyOf(name, refuse) ?? uriOf(name, refuse) };
  if (isNbdUri(name)) return { kind: 'nbd', name, uri: uriOf(name, refuse) };
  throw refuse(`protocol ${protocol} is none that is allowed`);
}

/** Not shortened: `..` after a link leads elsewhere than it looks. */
function resolved(name: string, path: string): string {
  return name.startsWith('/') || !path.includes('/') ? name : `${dirname(path)}/${name}`;
}

type Refuse = (why: string) => Error;

function uriOf(name: string, refuse: Refuse): NbdUri {
  let uri: NbdUri;
  try {
    uri = parseNbdUri(name.replace(/^nbd\+tcp:/i, 'nbd:'));
  } catch (error) {
    throw refuse(error instanceof Error ? error.message : String(error));
  }
  // Who we are to a server is not for an image to say.
  if (uri.tlsCertificates !== undefined) throw refuse('certificates are for the caller to name, by --tls-certificates');
  return uri;
}

/** nbd:HOST:PORT and nbd:unix:PATH, with :exportname=NAME or without (qemu-block-drivers(7)). */
function legacyOf(name: string, refuse: Refuse): NbdUri | null {
  if (name.startsWith('nbd://')) return null;
  const [, place = '', exportName = ''] = /^nbd:(.*?)(?::exportname=(.*))?$/s.exec(name) ?? [];
  const unix = /^unix:(.+)$/s.exec(place)?.[1];
  const inet = /^(\[[^\]]*\]|[^:]*):(\d+)$/.exec(place);
  if (unix === undefined && !inet) throw refuse('that is no address of an NBD server');
  const query = unix === undefined ? '' : `?socket=${encodeURIComponent(unix)}`;
  const [scheme, authority] = inet ? ['nbd', place] : ['nbd+unix', ''];
  return uriOf(`${scheme}://${authority}/${encodeURIComponent(exportName)}${query}`, refuse);
}
