import { setTimeout as sleep } from 'node:timers/promises';

export interface WaitOptions {
  timeout?: number;
  interval?: number;
}

/** Polls until the probe gives something other than undefined or false. */
export async function waitFor<T>(
  what: string,
  probe: () => T | Promise<T>,
  { timeout = 20_000, interval = 10 }: WaitOptions = {},
): Promise<Exclude<T, undefined | false>> {
  const end = performance.now() + timeout;
  for (;;) {
    const value = await probe();
    if (value !== undefined && value !== false) return value as Exclude<T, undefined | false>;
    if (performance.now() > end) throw new Error(`waited ${timeout} ms in vain for ${what}`);
    await sleep(interval);
  }
}
