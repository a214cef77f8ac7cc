#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "header.h"

namespace thicken::qcow2 {

/// One count of a refcount block, of 1 to 64 bits (1 << order).
uint64_t getCount(const uint8_t* block, uint32_t order, uint64_t index);
void setCount(uint8_t* block, uint32_t order, uint64_t index, uint64_t count);

/// The reference counts of an image: changed in memory, written when told to.
class Refcounts {
 public:
  Refcounts(Io& io, Image& image) : io_(io), image_(image) {}

  bool hasBlock(uint64_t blockIndex) const {
    return blockIndex < image_.refcountTable.size() && image_.refcountTable[blockIndex] != 0;
  }

  Outcome get(uint64_t cluster, uint64_t* count);
  /// The cluster's block must exist, or have been added.
  Outcome set(uint64_t cluster, uint64_t count);
  Outcome setRun(ClusterRun run, uint64_t count);

  /// A new block, all of zeros, that is to lie in `cluster`; writeEntries() makes it known.
  void addBlock(uint64_t blockIndex, uint64_t cluster);

  /// Writes changed counts and new blocks.
  Outcome writeBlocks();
  /// Writes the table's entries for new blocks. They, and their own counts, are on the disk.
  Outcome writeEntries();
  bool hasNewBlocks() const { return !added_.empty(); }

  /// Moves the table to `place`, which is counted already and large enough, with `blocks` entries
  /// in it: writes it, syncs, switches the header over, syncs. The old place keeps its counts.
  Outcome moveTable(ClusterRun place);

  /// Forgets what was read, but for a few blocks.
  void trim();
  /// Forgets everything, changes too.
  void reset();

 private:
  struct Block {
    std::vector<uint8_t> bytes;
    uint64_t dirtyFrom = ~0ull;  ///< bytes that differ from the disk
    uint64_t dirtyEnd = 0;
  };

  Outcome load(uint64_t blockIndex, Block** block);
  void mark(Block* block, uint64_t from, uint64_t end);

  Io& io_;
  Image& image_;
  std::map<uint64_t, Block> blocks_;
  std::vector<uint64_t> dirty_;    ///< indexes of changed blocks, each once
  std::vector<ClusterRun> added_;  ///< first is the block's index, count its cluster
};

}  // namespace thicken::qcow2
