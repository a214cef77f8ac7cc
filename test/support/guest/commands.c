#include "commands.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <unistd.h>

#include "churn.h"
#include "shell.h"

#define MOST_DISKS 8
#define MOST_NUMBERS 3

static struct disk disks[MOST_DISKS];
static unsigned disk_count;
static struct disk* disk;

/* What follows the name of a command; `rest` is all of it as it came. */
struct arguments {
  const char* rest;
  unsigned count;
  uint64_t numbers[MOST_NUMBERS];
};

typedef unsigned long long ull;

static void fail(FILE* out, int error) { fprintf(out, "error %s\n", strerror(error)); }

void greet(FILE* out) {
  disk_count = open_disks(disks, MOST_DISKS);
  disk = disk_count > 0 ? &disks[0] : NULL;
  fprintf(out, "ready");
  for (unsigned i = 0; i < disk_count; i++)
    fprintf(out, " %s=%llu", disks[i].name, (ull)disks[i].blocks * BLOCK);
  fprintf(out, "\n");
}

/* The blocks of the two numbers at `at`, bytes; the whole disk if they are not there. */
static bool range_of(const struct arguments* arguments, unsigned at, uint64_t* first,
                     uint64_t* count) {
  *first = 0;
  *count = disk->blocks;
  if (arguments->count <= at) return true;
  if (arguments->count != at + 2) return false;
  uint64_t offset = arguments->numbers[at], length = arguments->numbers[at + 1];
  *first = offset / BLOCK;
  *count = length / BLOCK;
  return offset % BLOCK == 0 && length % BLOCK == 0 && *count > 0 && *first <= disk->blocks &&
         *count <= disk->blocks - *first;
}

static void use(const struct arguments* arguments, FILE* out) {
  for (unsigned i = 0; i < disk_count; i++) {
    if (strcmp(disks[i].name, arguments->rest) != 0) continue;
    disk = &disks[i];
    fprintf(out, "ok\n");
    return;
  }
  fprintf(out, "error no such disk\n");
}

static void set_base(const struct arguments* arguments, FILE* out) {
  const uint64_t* numbers = arguments->numbers;
  if (arguments->count != 3 || numbers[1] == 0 || numbers[1] % BLOCK || numbers[2] % BLOCK) {
    fprintf(out, "error base SEED REGION LENGTH, in whole blocks\n");
    return;
  }
  disk->base = (struct base){generation_of((uint32_t)numbers[0], 0), numbers[1], numbers[2]};
  fprintf(out, "ok\n");
}

static unsigned piece(uint64_t left) {
  return (unsigned)(left < LARGEST / BLOCK ? left : LARGEST / BLOCK);
}

static void fill(const struct arguments* arguments, FILE* out) {
  uint64_t first, count;
  if (arguments->count == 0 || !range_of(arguments, 1, &first, &count)) {
    fprintf(out, "error fill SEED [OFFSET LENGTH], in whole blocks of the disk\n");
    return;
  }
  void* buffer = aligned_buffer();
  uint32_t generation = next_generation((uint32_t)arguments->numbers[0]);
  uint64_t start = now_us(), done = 0;
  int error = 0;
  for (; done < count && !error; done += piece(count - done))
    error = write_blocks(disk, first + done, piece(count - done), generation, buffer);
  free(buffer);
  if (error)
    fail(out, error);
  else
    fprintf(out, "ok bytes=%llu us=%llu\n", (ull)count * BLOCK, (ull)(now_us() - start));
}

static void verify(const struct arguments* arguments, FILE* out) {
  uint64_t first, count;
  if (!range_of(arguments, 0, &first, &count)) {
    fprintf(out, "error verify [OFFSET LENGTH], in whole blocks of the disk\n");
    return;
  }
  void* buffer = aligned_buffer();
  struct verdict verdict = {0};
  uint64_t start = now_us();
  int error = 0;
  for (uint64_t done = 0; done < count && !error; done += piece(count - done))
    error = check_blocks(disk, first + done, piece(count - done), buffer, &verdict);
  free(buffer);
  if (error) {
    fail(out, error);
    return;
  }
  fprintf(out, "ok blocks=%llu errors=%llu unknown=%llu us=%llu", (ull)verdict.blocks,
          (ull)verdict.errors, (ull)verdict.unknown, (ull)(now_us() - start));
  if (verdict.errors > 0) fprintf(out, " first=%llu", (ull)verdict.first);
  fprintf(out, "\n");
}

static void print_latencies(const struct latencies* latencies, FILE* out) {
  fprintf(out, " p50=%llu p99=%llu max=%llu", (ull)percentile(latencies, 0.5),
          (ull)percentile(latencies, 0.99), (ull)latencies->max);
}

static void report_churn(FILE* out) {
  static struct tally tally;
  read_tally(&tally);
  fprintf(out, "ok running=%d writes=%llu bytes=%llu reads=%llu errors=%llu failed=%llu",
          churn_runs(), (ull)tally.writes, (ull)tally.bytes, (ull)tally.reads, (ull)tally.errors,
          (ull)tally.failed);
  print_latencies(&tally.latencies, out);
  if (tally.errors > 0) fprintf(out, " first=%llu", (ull)tally.first);
  fprintf(out, "\n");
}

static void begin_churn(const struct arguments* arguments, FILE* out) {
  uint64_t threads = arguments->count > 1 ? arguments->numbers[1] : 1;
  if (arguments->count == 0 || threads == 0 || threads > MOST_THREADS)
    fprintf(out, "error churn SEED [THREADS]: 1 to %d\n", MOST_THREADS);
  else if (!start_churn(disk, (uint32_t)arguments->numbers[0], (unsigned)threads))
    fprintf(out, "error no threads\n");
  else
    fprintf(out, "ok\n");
}

static void end_churn(const struct arguments* arguments, FILE* out) {
  (void)arguments;
  if (churn_runs()) stop_churn();
  report_churn(out);
}

static void status(const struct arguments* arguments, FILE* out) {
  (void)arguments;
  report_churn(out);
}

static void latency(const struct arguments* arguments, FILE* out) {
  uint64_t first, count;
  if (arguments->count == 0 || !range_of(arguments, 1, &first, &count)) {
    fprintf(out, "error latency SECONDS [OFFSET LENGTH], in whole blocks of the disk\n");
    return;
  }
  static struct latencies latencies;
  memset(&latencies, 0, sizeof latencies);
  void* buffer = aligned_buffer();
  uint64_t random = 1, failed = 0, end = now_us() + arguments->numbers[0] * 1000000;
  while (now_us() < end) {
    uint64_t block = first + next_random(&random) % count, start = now_us();
    failed += write_blocks(disk, block, 1, next_generation(0), buffer) != 0;
    add_latency(&latencies, now_us() - start);
  }
  free(buffer);
  fprintf(out, "ok count=%llu failed=%llu", (ull)latencies.count, (ull)failed);
  print_latencies(&latencies, out);
  fprintf(out, "\n");
}

/* Runs of equal generations, as NUMBERxGENERATION, the latter in hexadecimal. */
static void dump(const struct arguments* arguments, FILE* out) {
  (void)arguments;
  fprintf(out, "ok");
  for (uint64_t start = 0, at = 1; start < disk->blocks; at++) {
    uint32_t generation = disk->generations[start];
    if (at < disk->blocks && disk->generations[at] == generation) continue;
    fprintf(out, " %llux%x", (ull)(at - start), generation);
    start = at;
  }
  fprintf(out, "\n");
}

static void flush(const struct arguments* arguments, FILE* out) {
  (void)arguments;
  if (fsync(disk->fd) == 0)
    fprintf(out, "ok\n");
  else
    fail(out, errno);
}

static void discard(const struct arguments* arguments, FILE* out) {
  uint64_t first, count;
  if (!range_of(arguments, 0, &first, &count)) {
    fprintf(out, "error discard [OFFSET LENGTH], in whole blocks of the disk\n");
    return;
  }
  int error = discard_blocks(disk, first, count);
  if (error)
    fail(out, error);
  else
    fprintf(out, "ok\n");
}

static void shell(const struct arguments* arguments, FILE* out) { run_shell(arguments->rest, out); }

static void power_off(const struct arguments* arguments, FILE* out) {
  (void)arguments;
  if (churn_runs()) stop_churn();
  for (unsigned i = 0; i < disk_count; i++) fsync(disks[i].fd);
  fprintf(out, "ok\n");
  fflush(out);
  reboot(RB_POWER_OFF);
}

/* `alone`: not while a churn changes the disk. */
static const struct command {
  const char* name;
  void (*run)(const struct arguments* arguments, FILE* out);
  bool alone, needs_disk;
} commands[] = {
    {"use", use, true, false},
    {"base", set_base, true, true},
    {"fill", fill, true, true},
    {"verify", verify, true, true},
    {"churn", begin_churn, true, true},
    {"status", status, false, false},
    {"stop", end_churn, false, false},
    {"latency", latency, true, true},
    {"dump", dump, true, true},
    {"flush", flush, false, true},
    {"discard", discard, true, true},
    {"sh", shell, false, false},
    {"poweroff", power_off, false, false},
};

static void parse_numbers(struct arguments* arguments) {
  const char* at = arguments->rest;
  while (arguments->count < MOST_NUMBERS) {
    char* end;
    uint64_t number = strtoull(at, &end, 10);
    if (end == at) return;
    arguments->numbers[arguments->count++] = number;
    at = end;
  }
}

void obey(char* line, FILE* out) {
  line[strcspn(line, "\r\n")] = '\0';
  const char* name = strsep(&line, " ");
  struct arguments arguments = {.rest = line ? line : ""};
  parse_numbers(&arguments);
  for (unsigned i = 0; i < sizeof commands / sizeof *commands; i++) {
    const struct command* command = &commands[i];
    if (strcmp(name, command->name) != 0) continue;
    if (command->alone && churn_runs())
      fprintf(out, "error a churn runs\n");
    else if (command->needs_disk && !disk)
      fprintf(out, "error no disk\n");
    else
      command->run(&arguments, out);
    return;
  }
  fprintf(out, "error unknown command\n");
}
