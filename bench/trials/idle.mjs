/** Peak memory above that of a node that has loaded nothing, in MiB. */
const idle = process.resourceUsage().maxRSS;

export function memoryAboveIdle() {
  return (process.resourceUsage().maxRSS - idle) / 1024;
}
