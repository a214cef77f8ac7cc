/** Starts a storage daemon, tells where, and keeps it until it is told to end: SIGTERM, or worse. */
import { StorageDaemon } from '../../build-modules/qemu/storage-daemon.js';

const daemon = await StorageDaemon.start();
console.log(`ready ${daemon.qmp.name}`);
process.once('SIGTERM', async () => {
  await daemon[Symbol.asyncDispose]();
  process.exit(0);
});
setInterval(() => undefined, 1000);
