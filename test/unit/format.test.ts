import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { ThickenError } from '../../lib/errors.js';
import { formatOf, PROBE_LENGTH, requireRaw } from '../../lib/format.js';

const text = (characters: string) => Buffer.from(characters, 'latin1');

const MAGIC: [format: string, at: number, magic: Buffer, suffix: string][] = [
  ['qcow2', 0, text('QFI\xfb'), '.qcow2'],
  ['qed', 0, text('QED\0'), '.qed'],
  ['vmdk', 0, text('KDMV'), '.vmdk'],
  ['vmdk', 0, text('COWD'), '.vmdk'],
  ['vmdk', 0, text('# Disk DescriptorFile'), '.vmdk'],
  ['vdi', 64, text('\x7f\x10\xda\xbe'), '.vdi'],
  ['vhdx', 0, text('vhdxfile'), '.vhdx'],
  ['vpc', 0, text('conectix'), '.vhd'],
  ['parallels', 0, text('WithoutFreeSpace'), '.hdd'],
  ['parallels', 0, text('WithouFreSpacExt'), '.hds'],
  ['luks', 0, text('LUKS\xba\xbe'), '.luks'],
];

function headOf(at: number, magic: Buffer): Buffer {
  const head = Buffer.alloc(PROBE_LENGTH);
  magic.copy(head, at);
  return head;
}

describe.each(MAGIC)('%s at %d', (name, at, magic, suffix) => {
  const head = headOf(at, magic);

  test('is believed where the name says so too', () => {
    expect(formatOf(`/images/disk${suffix}`, head, undefined)).toEqual({ name, by: 'suffix', doubtful: false });
    expect(formatOf(`/images/DISK${suffix.toUpperCase()}`, head, undefined).doubtful).toBe(false);
  });

  test.each(['disk', 'disk.raw', 'disk.img', `disk${suffix}.bak`, suffix])('is doubted in %s', (path) => {
    expect(formatOf(path, head, undefined)).toEqual({ name, by: 'probe', doubtful: true });
  });

  test('is raw where its bytes are one short', () => {
    expect(formatOf('disk', head.subarray(0, at + magic.length - 1), undefined).name).toBe('raw');
  });

  test('is raw where the caller says raw', () => {
    expect(formatOf(`disk${suffix}`, head, 'raw')).toEqual({ name: 'raw', by: 'option', doubtful: false });
  });

  test('can be stated whatever the bytes are', () => {
    expect(formatOf('disk', Buffer.alloc(512), name)).toEqual({ name, by: 'option', doubtful: false });
  });
});

describe('raw', () => {
  test.each(['disk', 'disk.raw', 'disk.qcow2', '/dev/sda'])('is what zeros are, in %s', (path) => {
    expect(formatOf(path, Buffer.alloc(512), undefined)).toEqual({ name: 'raw', by: 'probe', doubtful: false });
  });

  test('is what an empty file is', () => {
    expect(formatOf('disk.qcow2', Buffer.alloc(0), undefined).name).toBe('raw');
  });
});

test.each(['qcow3', '', 'RAW', 'raw ', '__proto__', 'x\ny'])('the format %j is not known: USAGE, in one line', (name) => {
  try {
    formatOf('disk', Buffer.alloc(512), name);
    expect.unreachable();
  } catch (error) {
    expect(error).toMatchObject({ code: 'USAGE' });
    expect((error as Error).message).toMatch(/^[^\n]*; use one of raw, [^\n]*$/);
  }
});

test('no head makes it throw, and doubt is for other formats than raw', () => {
  const head = fc.oneof(
    fc.uint8Array({ maxLength: PROBE_LENGTH }),
    fc.tuple(fc.constantFrom(...MAGIC), fc.uint8Array({ maxLength: 100 })).map(([[, at, magic], rest]) =>
      Buffer.concat([headOf(at, magic).subarray(0, at + magic.length), rest]),
    ),
  );
  fc.assert(
    fc.property(fc.string(), head, (path, bytes) => {
      const format = formatOf(path, bytes, undefined);
      expect(format.doubtful && format.name === 'raw').toBe(false);
      expect(format.doubtful && format.by !== 'probe').toBe(false);
    }),
  );
});

describe('requireRaw', () => {
  const codeOf = (path: string, head: Buffer, stated?: string) => {
    try {
      requireRaw(path, formatOf(path, head, stated), 'file');
      return null;
    } catch (error) {
      return (error as ThickenError).code;
    }
  };
  const qcow2 = headOf(0, text('QFI\xfb'));

  test('lets raw pass, probed or stated', () => {
    expect(codeOf('disk', Buffer.alloc(512))).toBeNull();
    expect(codeOf('disk', qcow2, 'raw')).toBeNull();
  });

  test('asks for the format where only the bytes speak for another', () => {
    expect(codeOf('disk.img', qcow2)).toBe('FORMAT_REQUIRED');
  });

  test('refuses a format that can’t be allocated yet', () => {
    expect(codeOf('disk.qcow2', qcow2)).toBe('UNSUPPORTED');
    expect(codeOf('disk.img', qcow2, 'qcow2')).toBe('UNSUPPORTED');
  });
});
