/** `virsh blockpull`, timed from the command to its end, on a domain that never runs. */
import { spawn } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';

/** `IMAGE AIO FOLDER`: the caller ends what is left in the folder, and removes it. */
const [, , image, aio, folder] = process.argv;
const name = 'bench';

// The driver runs in virsh itself, in a folder of its own: no daemon, no domain of this machine's.
mkdirSync(join(folder, 'etc'), { recursive: true });
writeFileSync(
  join(folder, 'etc/qemu.conf'),
  [
    'user = "root"',
    'group = "root"',
    'security_driver = "none"',
    'namespaces = []',
    'cgroup_controllers = []',
    'stdio_handler = "file"',
  ].join('\n'),
);
const domain = join(folder, 'domain.xml');
writeFileSync(
  domain,
  `<domain type="qemu"><name>${name}</name><memory unit="MiB">64</memory>
  <os><type arch="x86_64" machine="q35">hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type="file" device="disk">
      <driver name="qemu" type="qcow2" cache="none" io="${aio}"/>
      <source file="${image}"/><target dev="vda" bus="virtio"/>
    </disk>
    <controller type="usb" model="none"/><memballoon model="none"/>
  </devices></domain>`,
);

const virsh = spawn('virsh', ['--quiet', '--connect', `qemu:///embed?root=${folder}`]);
let [output, complaints, tell] = ['', '', () => undefined];
virsh.stdout.setEncoding('utf8').on('data', (text) => tell((output += text)));
virsh.stderr.setEncoding('utf8').on('data', (text) => (complaints += text));
const ended = new Promise((resolve) => virsh.once('close', resolve));

/** Resolves once virsh has carried the command out. */
function command(line) {
  const from = output.length;
  // The prompt, with the command echoed, comes first in its line.
  virsh.stdin.write(`${line}\necho carried-out\n`);
  const carriedOut = new Promise((resolve) => {
    tell = () => /^carried-out/m.test(output.slice(from)) && resolve();
  });
  const cut = ended.then(() => Promise.reject(new Error(`virsh ended: ${output}${complaints}`)));
  cut.catch(() => undefined);
  return Promise.race([carriedOut, cut]);
}

try {
  await command(`create ${domain} --paused`);
  const begin = performance.now();
  await command(`blockpull ${name} vda --wait`);
  const seconds = (performance.now() - begin) / 1000;
  await command(`destroy ${name} --graceful`);
  if (/^error:/m.test(complaints)) throw new Error(complaints);
  virsh.stdin.end('quit\n');
  await ended;
  console.log(JSON.stringify({ seconds }));
} finally {
  virsh.kill();
}
