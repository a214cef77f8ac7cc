import type { ExtentMethod } from './native.js';
import type { SecretSource } from './secret.js';

export interface OpenOptions {
  /** The image's format, in QEMU's words; without it, it is probed with the caution of a stranger. */
  format?: string;
  /** The format of backing files whose format no image records. */
  backingFormat?: string;
  /**
   * A folder of ca-cert.pem, client-cert.pem and client-key.pem: for NBD servers that want TLS, where the
   * URI of the target names none, and for those of backing files.
   */
  tlsCertificates?: string;
  /** The key of all encrypted qcow2 images of a chain, where something is copied out of or into one. */
  secret?: SecretSource;
  /** How the extents of a file are read; the best that the file system answers if absent. */
  extentMethod?: ExtentMethod;
}
