#pragma once

#include <stdbool.h>
#include <stdint.h>

/* Content that tells where it belongs and when it was written; guest-content.ts makes the same. */

#define SECTOR 512u
/* What a generation is kept for. Disks have less than 2^32 of these. */
#define BLOCK 4096u

/* Of a block that nobody wrote: it holds what the disk began with. */
#define UNWRITTEN 0u
/* Of a block that may hold anything: a write of it failed, or it was discarded. */
#define UNKNOWN UINT32_MAX

/* The number of the count-th write; never one of the two above. */
uint32_t generation_of(uint32_t seed, uint32_t count);

/* One block; of zeros if the generation is UNWRITTEN. */
void fill_block(void* to, uint64_t block, uint32_t generation);
bool block_matches(const void* from, uint64_t block, uint32_t generation);
