export interface CpioEntry {
  /** Without a leading slash. */
  name: string;
  /** A folder has none. */
  content?: Buffer;
}

const folderMode = 0o040755;
const fileMode = 0o100755;

/** An archive in cpio's "newc" format, as the kernel takes it for its first file system; all root's. */
export function cpio(entries: readonly CpioEntry[]): Buffer {
  const members = entries.map(({ name, content }, index) =>
    member(name, index + 1, content === undefined ? folderMode : fileMode, content),
  );
  return Buffer.concat([...members, member('TRAILER!!!', 0, 0)]);
}

/** Thirteen numbers of eight hexadecimal digits after the magic one; name and content padded to 4 bytes. */
function member(name: string, inode: number, mode: number, content: Buffer = Buffer.alloc(0)): Buffer {
  const nameSize = Buffer.byteLength(name) + 1;
  const owner = [0, 0];
  const [links, time, device, checksum] = [1, 0, [0, 0, 0, 0], 0];
  const fields = [inode, mode, ...owner, links, time, content.length, ...device, nameSize, checksum];
  const numbers = fields.map((field) => field.toString(16).padStart(8, '0')).join('');
  return Buffer.concat([padded(Buffer.from(`070701${numbers}${name}\0`)), padded(content)]);
}

function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes, Buffer.alloc(-bytes.length & 3)]);
}
