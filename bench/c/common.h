#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { DEFAULT_EXTENTS_PER_CALL = 2048 };

static inline double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline void die(const char* what) {
  fprintf(stderr, "%s: %s\n", what, strerror(errno));
  exit(1);
}

static inline int open_file(const char* path, int flags) {
  int fd = open(path, flags | O_CLOEXEC);
  if (fd < 0) die(path);
  return fd;
}

static inline uint64_t file_size(int fd) {
  struct stat st;
  if (fstat(fd, &st) != 0) die("fstat");
  return (uint64_t)st.st_size;
}

static inline void* allocate_or_die(size_t size) {
  void* memory = malloc(size);
  if (memory == NULL) die("malloc");
  return memory;
}

typedef void (*extent_visitor)(void* context, const struct fiemap_extent* extent);

/* Returns how many extents the file has. */
static inline uint64_t scan_fiemap(int fd, uint32_t per_call, extent_visitor visit, void* context) {
  struct fiemap* map =
      allocate_or_die(sizeof(struct fiemap) + per_call * sizeof(struct fiemap_extent));
  uint64_t position = 0, count = 0;
  int last = 0;
  while (!last) {
    memset(map, 0, sizeof(*map));
    map->fm_start = position;
    map->fm_length = FIEMAP_MAX_OFFSET - position;
    map->fm_flags = FIEMAP_FLAG_SYNC;
    map->fm_extent_count = per_call;
    if (ioctl(fd, FS_IOC_FIEMAP, map) != 0) die("FIEMAP");
    if (map->fm_mapped_extents == 0) break;
    for (uint32_t i = 0; i < map->fm_mapped_extents; i++) {
      const struct fiemap_extent* extent = &map->fm_extents[i];
      if (visit != NULL) visit(context, extent);
      position = extent->fe_logical + extent->fe_length;
      last = (extent->fe_flags & FIEMAP_EXTENT_LAST) != 0;
    }
    count += map->fm_mapped_extents;
  }
  free(map);
  return count;
}

struct range {
  uint64_t offset, length;
};

struct ranges {
  struct range* items;
  size_t count, capacity;
  uint64_t end;
};

static inline void add_range(struct ranges* ranges, uint64_t offset, uint64_t length) {
  if (ranges->count == ranges->capacity) {
    ranges->capacity = ranges->capacity == 0 ? 1024 : 2 * ranges->capacity;
    ranges->items = realloc(ranges->items, ranges->capacity * sizeof(struct range));
    if (ranges->items == NULL) die("realloc");
  }
  ranges->items[ranges->count++] = (struct range){offset, length};
}

static inline void note_gap(void* context, const struct fiemap_extent* extent) {
  struct ranges* holes = context;
  if (extent->fe_logical > holes->end) {
    add_range(holes, holes->end, extent->fe_logical - holes->end);
  }
  holes->end = extent->fe_logical + extent->fe_length;
}

static inline struct ranges find_holes(int fd) {
  struct ranges holes = {NULL, 0, 0, 0};
  uint64_t size = file_size(fd);
  scan_fiemap(fd, DEFAULT_EXTENTS_PER_CALL, note_gap, &holes);
  if (holes.end < size) add_range(&holes, holes.end, size - holes.end);
  return holes;
}

static inline int wants_fsync(int argc, char** argv) {
  if (argc < 2 || argc > 3 || (argc == 3 && strcmp(argv[2], "--fsync") != 0)) {
    fprintf(stderr, "usage: %s FILE [--fsync]\n", argv[0]);
    exit(2);
  }
  return argc == 3;
}

static inline void sync_file(int fd) {
  if (fsync(fd) != 0) die("fsync");
}

static inline void report(double begin, uint64_t count) {
  printf("{\"seconds\":%.6f,\"count\":%llu}\n", now() - begin, (unsigned long long)count);
}

#endif
