#include "layout.h"

#include <algorithm>

namespace thicken::qcow2 {
namespace {

// Blocks are missing from some index on, but for few: no image has more than its table holds.
uint64_t missingBlocks(ClusterRun clusters, uint64_t blockEntries, const HasBlock& hasBlock) {
  if (clusters.count == 0) return 0;
  uint64_t missing = 0;
  const uint64_t last = (clusters.end() - 1) / blockEntries;
  for (uint64_t index = clusters.first / blockEntries; index <= last; index++)
    if (!hasBlock(index)) missing++;
  return missing;
}

}  // namespace

uint64_t layoutEnd(uint64_t first, uint64_t count, uint64_t blockEntries,
                   const HasBlock& hasBlock) {
  if (count == 0) return first;
  uint64_t blocks = 0;
  for (;;) {
    const uint64_t missing =
        missingBlocks(ClusterRun{first, count + blocks}, blockEntries, hasBlock);
    if (missing == blocks) return first + count + blocks;
    blocks = missing;
  }
}

uint64_t blocksWithin(uint64_t count, uint64_t blockEntries, const HasBlock& hasBlock) {
  uint64_t blocks = 0;
  for (;;) {
    const uint64_t missing = missingBlocks(ClusterRun{0, count + blocks}, blockEntries, hasBlock);
    if (missing == blocks) return blocks;
    blocks = missing;
  }
}

Layout::Layout(uint64_t first, uint64_t count, uint64_t blockEntries, const HasBlock& hasBlock) {
  area_ = ClusterRun{first, layoutEnd(first, count, blockEntries, hasBlock) - first};
  at_ = first;
  if (area_.count == 0) return;
  const uint64_t last = (area_.end() - 1) / blockEntries;
  for (uint64_t index = first / blockEntries; index <= last; index++)
    if (!hasBlock(index))
      blocks_.push_back(ClusterRun{index, std::max(first, index * blockEntries)});
}

uint64_t Layout::peek() {
  while (nextBlock_ < blocks_.size() && blocks_[nextBlock_].count == at_) {
    at_++;
    nextBlock_++;
  }
  return at_;
}

ClusterRun Layout::take(uint64_t most) {
  peek();
  const uint64_t end = nextBlock_ < blocks_.size() ? blocks_[nextBlock_].count : area_.end();
  const ClusterRun run{at_, std::min(most, end - at_)};
  at_ += run.count;
  return run;
}

Growth planGrowth(const Geometry& geometry, uint64_t first, uint64_t count, uint64_t tableEntries,
                  const HasBlock& hasBlock) {
  const uint64_t entries = geometry.blockEntries();
  const uint64_t plain = layoutEnd(first, count, entries, hasBlock);
  if ((plain + entries - 1) / entries <= tableEntries) return {};
  Growth growth;
  for (;;) {
    const ClusterRun own{first, growth.blocks + growth.table};
    const uint64_t blocks = missingBlocks(own, entries, hasBlock);
    const auto hasThen = [&](uint64_t index) {
      return hasBlock(index) ||
             (own.count > 0 && index >= own.first / entries && index <= (own.end() - 1) / entries);
    };
    const uint64_t end = layoutEnd(own.end(), count, entries, hasThen);
    const uint64_t table = geometry.clustersFor((end + entries - 1) / entries * 8);
    if (blocks <= growth.blocks && table <= growth.table) return growth;
    growth.blocks = std::max(blocks, growth.blocks);
    growth.table = std::max(table, growth.table);
  }
}

}  // namespace thicken::qcow2
