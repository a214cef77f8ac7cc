#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "pattern.h"

/* The largest request; buffers have this size. */
#define LARGEST (1u << 20)

/* What unwritten blocks hold: regions in turn zeros (the first) and data of the generation, up to
   `length`, then zeros. Bytes; multiples of BLOCK. */
struct base {
  uint32_t generation;
  uint64_t region;
  uint64_t length;
};

struct disk {
  char name[256];
  int fd;
  uint64_t blocks;
  uint32_t* generations;
  struct base base;
};

/* What reading found; `first` is the byte offset of the first wrong block. */
struct verdict {
  uint64_t blocks, errors, unknown, first;
};

/* All disks that the kernel has found, opened with O_DIRECT; their number. */
unsigned open_disks(struct disk* disks, unsigned most);

/* Ends the program if there is no memory. */
void* aligned_buffer(void);

/* 0 or an errno. The blocks must not be in any other request at that time. */
int write_blocks(struct disk* disk, uint64_t first, unsigned count, uint32_t generation,
                 void* buffer);
/* Adds to the verdict; 0 or an errno. */
int check_blocks(struct disk* disk, uint64_t first, unsigned count, void* buffer,
                 struct verdict* verdict);
int discard_blocks(struct disk* disk, uint64_t first, uint64_t count);

/* 64 random bits; any state but 0. */
uint64_t next_random(uint64_t* state);
