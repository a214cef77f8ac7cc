#include "disk.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define MOST_REPORTS 100

static bool open_disk(struct disk* disk, const char* name) {
  char path[264];
  uint64_t bytes = 0;
  snprintf(disk->name, sizeof disk->name, "%s", name);
  snprintf(path, sizeof path, "/dev/%s", disk->name);
  disk->fd = open(path, O_RDWR | O_DIRECT | O_CLOEXEC);
  // A disk that can't be written can still be verified.
  if (disk->fd < 0) disk->fd = open(path, O_RDONLY | O_DIRECT | O_CLOEXEC);
  if (disk->fd < 0 || ioctl(disk->fd, BLKGETSIZE64, &bytes) != 0) return false;
  disk->blocks = bytes / BLOCK;
  disk->generations = calloc(disk->blocks, sizeof *disk->generations);
  return disk->generations != NULL;
}

static int by_name(const void* a, const void* b) {
  return strcmp(((const struct disk*)a)->name, ((const struct disk*)b)->name);
}

unsigned open_disks(struct disk* disks, unsigned most) {
  unsigned count = 0;
  DIR* folder = opendir("/sys/block");
  if (!folder) return 0;
  for (struct dirent* entry; count < most && (entry = readdir(folder));) {
    if (strncmp(entry->d_name, "vd", 2) != 0) continue;
    if (open_disk(&disks[count], entry->d_name))
      count++;
    else
      perror(entry->d_name);
  }
  closedir(folder);
  qsort(disks, count, sizeof *disks, by_name);
  return count;
}

void* aligned_buffer(void) {
  void* buffer = aligned_alloc(BLOCK, LARGEST);
  if (buffer) return buffer;
  fprintf(stderr, "no memory\n");
  exit(1);
}

static uint32_t expected(const struct disk* disk, uint64_t block) {
  uint32_t generation = disk->generations[block];
  const struct base* base = &disk->base;
  if (generation != UNWRITTEN || base->region == 0) return generation;
  uint64_t offset = block * BLOCK;
  bool data = offset < base->length && offset / base->region % 2 == 1;
  return data ? base->generation : UNWRITTEN;
}

/* Linux may do less than it was asked to, for a bad sector in the middle, for instance. */
static int transfer(int fd, bool out, char* buffer, size_t length, uint64_t offset) {
  while (length > 0) {
    ssize_t done =
        out ? pwrite(fd, buffer, length, (off_t)offset) : pread(fd, buffer, length, (off_t)offset);
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return errno;
    if (done == 0) return EIO;
    buffer += done;
    offset += (size_t)done;
    length -= (size_t)done;
  }
  return 0;
}

static void set_generations(struct disk* disk, uint64_t first, uint64_t count, uint32_t value) {
  for (uint64_t i = 0; i < count; i++) disk->generations[first + i] = value;
}

int write_blocks(struct disk* disk, uint64_t first, unsigned count, uint32_t generation,
                 void* buffer) {
  for (unsigned i = 0; i < count; i++) fill_block((char*)buffer + i * BLOCK, first + i, generation);
  int error = transfer(disk->fd, true, buffer, count * BLOCK, first * BLOCK);
  set_generations(disk, first, count, error ? UNKNOWN : generation);
  return error;
}

/* Some are enough to see what is wrong; a churn over a ruined disk would never end to print. */
static void report_wrong(const struct disk* disk, uint64_t block, const uint64_t* found) {
  static atomic_uint reports;
  if (atomic_fetch_add(&reports, 1) >= MOST_REPORTS) return;
  fprintf(stderr, "%s: block at %llu is wrong: generation %#x expected, begins with %#llx\n",
          disk->name, (unsigned long long)(block * BLOCK), expected(disk, block),
          (unsigned long long)found[0]);
}

int check_blocks(struct disk* disk, uint64_t first, unsigned count, void* buffer,
                 struct verdict* verdict) {
  int error = transfer(disk->fd, false, buffer, count * BLOCK, first * BLOCK);
  if (error) return error;
  for (unsigned i = 0; i < count; i++) {
    uint64_t block = first + i;
    const void* found = (char*)buffer + i * BLOCK;
    verdict->blocks++;
    if (disk->generations[block] == UNKNOWN) {
      verdict->unknown++;
    } else if (!block_matches(found, block, expected(disk, block))) {
      if (verdict->errors++ == 0) {
        verdict->first = block * BLOCK;
        report_wrong(disk, block, found);
      }
    }
  }
  return 0;
}

int discard_blocks(struct disk* disk, uint64_t first, uint64_t count) {
  uint64_t range[2] = {first * BLOCK, count * BLOCK};
  if (ioctl(disk->fd, BLKDISCARD, range) != 0) return errno;
  set_generations(disk, first, count, UNKNOWN);
  return 0;
}

uint64_t next_random(uint64_t* state) {
  *state ^= *state << 13;
  *state ^= *state >> 7;
  return *state ^= *state << 17;
}
