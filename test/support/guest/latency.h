#pragma once

#include <stdint.h>

/* Latencies in buckets at most a 32nd wide: bounded memory however long a test runs. */
#define BUCKETS (60 * 32)

struct latencies {
  uint64_t count, max;
  uint32_t buckets[BUCKETS];
};

/* Microseconds of CLOCK_MONOTONIC. It stands still while QEMU has stopped the guest. */
uint64_t now_us(void);

void add_latency(struct latencies* latencies, uint64_t us);
/* The upper end of the bucket in which the given share of all, from 0 to 1, is reached; at most the
   maximum. */
uint64_t percentile(const struct latencies* latencies, double share);
