#include "pattern.h"

#include <string.h>

#define STEP 0x9e3779b97f4a7c15u
#define WORDS (SECTOR / 8)
#define SECTORS (BLOCK / SECTOR)

static uint32_t mix(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca77u;
  x = (x ^ (x >> 13)) * 0x9e3779b1u;
  return x ^ (x >> 16);
}

uint32_t generation_of(uint32_t seed, uint32_t count) {
  uint32_t generation = mix(mix(count + 1) + seed);
  return generation == UNWRITTEN || generation == UNKNOWN ? 1 : generation;
}

/* The other words of the sector follow in steps: one addition for eight bytes, since QEMU emulates
   the processor. */
static uint64_t first_word(uint64_t sector, uint32_t generation) {
  uint32_t low = mix(mix((uint32_t)sector) + (uint32_t)(sector >> 32) + generation);
  return (uint64_t)mix(low + generation) << 32 | low;
}

void fill_block(void* to, uint64_t block, uint32_t generation) {
  if (generation == UNWRITTEN) {
    memset(to, 0, BLOCK);
    return;
  }
  uint64_t* words = to;
  for (uint64_t sector = 0; sector < SECTORS; sector++) {
    uint64_t word = first_word(block * SECTORS + sector, generation);
    for (unsigned i = 0; i < WORDS; i++, word += STEP) *words++ = word;
  }
}

bool block_matches(const void* from, uint64_t block, uint32_t generation) {
  const uint64_t* words = from;
  uint64_t wrong = 0;
  if (generation == UNWRITTEN) {
    for (unsigned i = 0; i < BLOCK / 8; i++) wrong |= words[i];
    return wrong == 0;
  }
  for (uint64_t sector = 0; sector < SECTORS; sector++) {
    uint64_t word = first_word(block * SECTORS + sector, generation);
    for (unsigned i = 0; i < WORDS; i++, word += STEP) wrong |= *words++ ^ word;
  }
  return wrong == 0;
}
