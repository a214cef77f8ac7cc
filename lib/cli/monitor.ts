/** A command's way to a QMP monitor, and back when somebody presses Ctrl-C. */
import { QmpClient } from '../qmp/client.js';
import { qmpErrors } from '../qmp/errors.js';

/**
 * What `work` gives, on a connection of its own. Throws CANCELLED when `signal` aborts, also where
 * QEMU does not answer: the connection is closed, and `work` left behind.
 */
export async function onMonitor<T>(
  address: string,
  signal: AbortSignal,
  work: (client: QmpClient) => Promise<T>,
): Promise<T> {
  await using client = await QmpClient.connect(address, { signal });
  const aborted = new Promise<never>((_, reject) => {
    const tell = () => reject(qmpErrors.cancelled(client.name, 'the command', signal.reason));
    if (signal.aborted) tell();
    else signal.addEventListener('abort', tell, { once: true });
  });
  return await Promise.race([work(client), aborted]);
}
