#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "geometry.h"

namespace thicken::qcow2 {

using HasBlock = std::function<bool(uint64_t blockIndex)>;

/// Where new clusters lie: one stretch of the file, in which every region of counts that has no
/// refcount block yet gets one. A new block lies in the region that it counts itself, so that
/// whatever part of the refcount table reaches the disk, no block refers to one that did not.
class Layout {
 public:
  /// `count` clusters besides the blocks, from cluster `first` on.
  Layout(uint64_t first, uint64_t count, uint64_t blockEntries, const HasBlock& hasBlock);

  ClusterRun area() const { return area_; }
  uint64_t end() const { return area_.end(); }
  /// Index of each new block in `first`, its cluster in `count`.
  const std::vector<ClusterRun>& blocks() const { return blocks_; }

  /// The next free cluster of the area.
  uint64_t peek();
  /// The next free clusters of the area: up to `most`, which follow each other.
  ClusterRun take(uint64_t most);

 private:
  ClusterRun area_;
  std::vector<ClusterRun> blocks_;
  uint64_t at_ = 0;
  size_t nextBlock_ = 0;
};

/// Like a layout's end, without making it.
uint64_t layoutEnd(uint64_t first, uint64_t count, uint64_t blockEntries, const HasBlock& hasBlock);

/// Refcount blocks that are missing of the first `count` clusters, and of the clusters that these
/// blocks take behind them.
uint64_t blocksWithin(uint64_t count, uint64_t blockEntries, const HasBlock& hasBlock);

/// Where a refcount table goes that is too small for `count` more clusters.
struct Growth {
  uint64_t blocks = 0;  ///< refcount blocks for the growth itself; they come first
  uint64_t table = 0;   ///< clusters of the new table; 0 when the old one is large enough
};

Growth planGrowth(const Geometry& geometry, uint64_t first, uint64_t count, uint64_t tableEntries,
                  const HasBlock& hasBlock);

}  // namespace thicken::qcow2
