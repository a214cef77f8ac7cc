#pragma once

#include <stdbool.h>

#include "disk.h"
#include "latency.h"

#define MOST_THREADS 32

/* What a churn has done so far; `errors` counts blocks that held something else than was written,
   `failed` requests that the kernel refused. */
struct tally {
  uint64_t writes, bytes, reads, errors, failed, first;
  struct latencies latencies;
};

/* Random requests of 1 to 16 blocks, three of four of them writes, by so many threads; false if
   they can't be started. One at a time. */
bool start_churn(struct disk* disk, uint32_t seed, unsigned threads);
bool churn_runs(void);
void read_tally(struct tally* to);
/* Lets the requests in flight end. */
void stop_churn(void);

/* A number for one write; of all threads, of all disks. */
uint32_t next_generation(uint32_t seed);
