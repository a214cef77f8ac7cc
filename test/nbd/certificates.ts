/** Certificates for TLS, made with openssl. */
import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { mustRun } from '../support/processes.js';

const openssl = (...args: string[]) => mustRun('openssl', args);

/** Makes a folder with a certificate authority. */
export async function authority(folder: string): Promise<void> {
  mkdirSync(folder);
  const [key, certificate] = [join(folder, 'ca-key.pem'), join(folder, 'ca-cert.pem')];
  await openssl('req', '-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-days', '2', '-subj', '/CN=test authority', '-keyout', key, '-out', certificate);
}

/** A certificate named `kind`-cert.pem, by the authority of the folder. */
export async function certificate(folder: string, kind: 'server' | 'client', names: string): Promise<void> {
  const file = (name: string) => join(folder, name);
  writeFileSync(file('names'), names);
  await openssl('req', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-subj', `/CN=${kind}`, '-keyout', file(`${kind}-key.pem`), '-out', file('request'));
  await openssl('x509', '-req', '-days', '2', '-in', file('request'), '-CA', file('ca-cert.pem'), '-CAkey', file('ca-key.pem'), '-CAcreateserial', '-extfile', file('names'), '-out', file(`${kind}-cert.pem`));
}
