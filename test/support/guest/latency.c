#include "latency.h"

#include <time.h>

uint64_t now_us(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000;
}

/* Below 32 each has its own; above, each power of two is divided by 32. */
static unsigned bucket_of(uint64_t us) {
  if (us < 32) return (unsigned)us;
  unsigned shift = 63u - (unsigned)__builtin_clzll(us) - 5u;
  return (shift + 1) * 32 + (unsigned)(us >> shift) - 32;
}

static uint64_t end_of(unsigned bucket) {
  if (bucket < 32) return bucket;
  unsigned shift = bucket / 32 - 1;
  return ((uint64_t)(bucket % 32 + 32 + 1) << shift) - 1;
}

void add_latency(struct latencies* latencies, uint64_t us) {
  latencies->count++;
  latencies->buckets[bucket_of(us)]++;
  if (us > latencies->max) latencies->max = us;
}

uint64_t percentile(const struct latencies* latencies, double share) {
  double wanted = share * (double)latencies->count;
  uint64_t seen = 0;
  for (unsigned bucket = 0; bucket < BUCKETS; bucket++) {
    seen += latencies->buckets[bucket];
    if (seen == 0 || (double)seen < wanted) continue;
    uint64_t end = end_of(bucket);
    return end < latencies->max ? end : latencies->max;
  }
  return 0;
}
