import { accessSync, constants } from 'node:fs';
import { delimiter, join } from 'node:path';
import { step } from './step.mjs';

/** Programs and the Debian packages that bring them. */
const build = { 'g++': 'g++', make: 'make', python3: 'python3', flock: 'util-linux' };
const ext4 = { 'mkfs.ext4': 'e2fsprogs', e2fsck: 'e2fsprogs' };
const storage = {
  ...ext4,
  'mkfs.xfs': 'xfsprogs',
  'mkfs.btrfs': 'btrfs-progs',
  xfs_io: 'xfsprogs',
  chattr: 'e2fsprogs',
  filefrag: 'e2fsprogs',
  fallocate: 'util-linux',
  losetup: 'mount',
  mount: 'mount',
  partx: 'util-linux',
  'qemu-img': 'qemu-utils',
};

const tools = {
  build,
  demo: { ...build, ...ext4 },
  test: {
    ...build,
    ...storage,
    cmake: 'cmake',
    gcc: 'gcc',
    // libFuzzer is in a package of its own.
    'clang++-14': 'clang-14 libclang-rt-14-dev',
    cmp: 'diffutils',
    'qemu-storage-daemon': 'qemu-system-common',
    'qemu-system-x86_64': 'qemu-system-x86',
    strace: 'strace',
    'qemu-nbd': 'qemu-utils',
    'qemu-io': 'qemu-utils',
    nbdkit: 'nbdkit',
    nbdinfo: 'libnbd-bin',
    openssl: 'openssl',
    sshd: 'openssh-server',
    'ssh-keygen': 'openssh-client',
  },
  bench: {
    ...build,
    ...storage,
    gcc: 'gcc',
    nbdkit: 'nbdkit',
    'qemu-system-x86_64': 'qemu-system-x86',
    'qemu-io': 'qemu-utils',
    // The second brings the driver, the third the user that libvirt wants to find.
    virsh: 'libvirt-clients libvirt-daemon-driver-qemu libvirt-daemon-system',
  },
  // Another version formats differently.
  lint: { ...build, 'clang-format-14': 'clang-format-14' },
};

export const modes = Object.keys(tools);

// Where Debian keeps file-system tools, which is not on a user's PATH.
const systemFolders = ['/usr/sbin', '/sbin'];

export function addSystemFolders(environment = process.env) {
  const folders = (environment.PATH ?? '').split(delimiter);
  const missing = systemFolders.filter((folder) => !folders.includes(folder));
  return [...folders, ...missing].join(delimiter);
}

export function missingPackages(mode) {
  const folders = addSystemFolders().split(delimiter);
  const found = (tool) => folders.some((folder) => isExecutable(join(folder, tool)));
  const missing = Object.entries(tools[mode]).filter(([tool]) => !found(tool));
  return [...new Set(missing.flatMap(([, names]) => names.split(' ')))].sort();
}

function isExecutable(path) {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

export function installPackages(packages) {
  const install = `apt-get install --no-install-recommends ${packages.join(' ')}`;
  if (process.geteuid() !== 0 || !isExecutable('/usr/bin/apt-get')) {
    throw new Error(`not installed here: ${packages.join(', ')}; as root: ${install}`);
  }
  const options = ['-qq', '-o', 'DPkg::Lock::Timeout=300'];
  const env = { ...process.env, DEBIAN_FRONTEND: 'noninteractive' };
  step('package lists', 'apt-get', [...options, 'update'], { env });
  step(
    `packages: ${packages.join(' ')}`,
    'apt-get',
    [...options, '-y', '--no-install-recommends', 'install', ...packages],
    { env },
  );
}
