#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "cancel.h"
#include "status.h"

namespace thicken {

/// Storage behind a byte range, as the file system tells it. The numbers cross into JavaScript
/// (lib/extent.ts holds the same order).
enum class HostState : uint8_t { hole = 0, unwritten = 1, written = 2, shared = 3, unknown = 4 };

/// `pages` is SEEK_HOLE, with the holes told apart by what the page cache holds of them.
enum class ExtentMethod : uint8_t { fiemap = 0, seek = 1, fibmap = 2, pages = 3 };

/// Consecutive extents without a gap between them, in struct-of-arrays form: that is how they
/// cross into typed arrays.
struct ExtentPage {
  std::vector<double> offset;
  std::vector<double> length;
  std::vector<uint8_t> state;
  std::vector<uint32_t> flags;  ///< FIEMAP_EXTENT_* (linux/fiemap.h), without LAST and MERGED
  uint64_t next = 0;            ///< where the following page starts
  bool cancelled = false;

  size_t size() const { return offset.size(); }
  void add(Range range, HostState state, uint32_t flags);
};

/// Reads extents of [range) until `maxExtents` are collected or the range ends (page.next is then
/// its end). Neighbours of the same state and flags are merged, also across the kernel's batches,
/// so that two pages never split one extent.
Status readExtents(int fd, ExtentMethod method, Range range, size_t maxExtents,
                   const CancelFlag& cancel, ExtentPage* page);

}  // namespace thicken
