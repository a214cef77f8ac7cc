import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { options } from './lib/options.mjs';
import { measure } from './lib/report.mjs';

const folder = mkdtempSync(join(tmpdir(), 'thicken-bench-'));
process.once('exit', () => rmSync(folder, { recursive: true, force: true }));
const file = join(folder, 'small.raw');
writeFileSync(file, '');
truncateSync(file, 2 ** 20);

const node = process.execPath;
await measure({
  name: 'startup',
  title: 'Start-up of the command line',
  trials: options.quick ? 3 : 20,
  rivals: [
    { name: 'thicken --version', command: node, args: ['dist/cli/main.js', '--version'] },
    { name: 'thicken info', command: node, args: ['dist/cli/main.js', 'info', file] },
    { name: 'node -e 0', command: node, args: ['-e', '0'] },
    { name: 'qemu-img --version', command: 'qemu-img', args: ['--version'] },
    { name: 'qemu-img info', command: 'qemu-img', args: ['info', '-f', 'raw', file] },
  ],
});
