#include "churn.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#define MOST_BLOCKS 16u

struct range {
  uint64_t first;
  unsigned count;
};

static struct {
  struct disk* disk;
  uint32_t seed;
  unsigned threads;
  pthread_t ids[MOST_THREADS];
  struct range busy[MOST_THREADS];
  struct tally tally;
  pthread_mutex_t mutex;
  atomic_bool stop;
} churn = {.mutex = PTHREAD_MUTEX_INITIALIZER};

static atomic_uint writes_so_far;

uint32_t next_generation(uint32_t seed) {
  return generation_of(seed, atomic_fetch_add(&writes_so_far, 1) + 1);
}

static bool is_free(const struct range* wanted) {
  for (unsigned i = 0; i < churn.threads; i++) {
    const struct range* busy = &churn.busy[i];
    if (busy->count == 0) continue;
    if (wanted->first < busy->first + busy->count && busy->first < wanted->first + wanted->count)
      return false;
  }
  return true;
}

static struct range random_range(uint64_t* random) {
  struct range range = {.first = next_random(random) % churn.disk->blocks};
  uint64_t count = next_random(random) % MOST_BLOCKS + 1;
  uint64_t left = churn.disk->blocks - range.first;
  range.count = (unsigned)(count < left ? count : left);
  return range;
}

/* A range that no other thread works on: what two writes at once leave is anybody's guess. */
static struct range take_range(unsigned self, uint64_t* random) {
  for (;;) {
    struct range range = random_range(random);
    pthread_mutex_lock(&churn.mutex);
    bool taken = is_free(&range);
    if (taken) churn.busy[self] = range;
    pthread_mutex_unlock(&churn.mutex);
    if (taken) return range;
    sched_yield();
  }
}

static void give_back(unsigned self) {
  pthread_mutex_lock(&churn.mutex);
  churn.busy[self].count = 0;
  pthread_mutex_unlock(&churn.mutex);
}

static void write_some(struct range range, void* buffer) {
  uint64_t start = now_us();
  int error =
      write_blocks(churn.disk, range.first, range.count, next_generation(churn.seed), buffer);
  uint64_t took = now_us() - start;
  pthread_mutex_lock(&churn.mutex);
  churn.tally.writes++;
  churn.tally.bytes += range.count * BLOCK;
  churn.tally.failed += error != 0;
  add_latency(&churn.tally.latencies, took);
  pthread_mutex_unlock(&churn.mutex);
}

static void check_some(struct range range, void* buffer) {
  struct verdict verdict = {0};
  int error = check_blocks(churn.disk, range.first, range.count, buffer, &verdict);
  pthread_mutex_lock(&churn.mutex);
  churn.tally.reads++;
  churn.tally.failed += error != 0;
  if (verdict.errors > 0 && churn.tally.errors == 0) churn.tally.first = verdict.first;
  churn.tally.errors += verdict.errors;
  pthread_mutex_unlock(&churn.mutex);
}

static void* work(void* argument) {
  unsigned self = (unsigned)(uintptr_t)argument;
  void* buffer = aligned_buffer();
  uint64_t random = ((uint64_t)churn.seed << 32 | (self + 1)) * 0x9e3779b97f4a7c15u | 1;
  while (!atomic_load(&churn.stop)) {
    struct range range = take_range(self, &random);
    if (next_random(&random) >> 62 == 0)
      check_some(range, buffer);
    else
      write_some(range, buffer);
    give_back(self);
  }
  free(buffer);
  return NULL;
}

static void join(unsigned threads) {
  atomic_store(&churn.stop, true);
  for (unsigned i = 0; i < threads; i++) pthread_join(churn.ids[i], NULL);
  churn.disk = NULL;
}

bool start_churn(struct disk* disk, uint32_t seed, unsigned threads) {
  churn.disk = disk;
  churn.seed = seed;
  churn.threads = threads;
  memset(churn.busy, 0, sizeof churn.busy);
  memset(&churn.tally, 0, sizeof churn.tally);
  atomic_store(&churn.stop, false);
  for (unsigned i = 0; i < threads; i++) {
    if (pthread_create(&churn.ids[i], NULL, work, (void*)(uintptr_t)i) == 0) continue;
    join(i);
    return false;
  }
  return true;
}

bool churn_runs(void) { return churn.disk != NULL; }

void read_tally(struct tally* to) {
  pthread_mutex_lock(&churn.mutex);
  *to = churn.tally;
  pthread_mutex_unlock(&churn.mutex);
}

void stop_churn(void) { join(churn.threads); }
