#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "../extents.h"
#include "header.h"
#include "map.h"

namespace thicken::qcow2 {

/// What of a range has no blocks of its own. Bytes.
struct Lacking {
  uint64_t holes = 0;
  uint64_t shared = 0;  ///< with another file
  uint64_t held = 0;    ///< what may hold bytes that are not zeros, shared or not

  void add(HostState state, uint64_t bytes) {
    if (state == HostState::hole) holes += bytes;
    if (state != HostState::hole && state != HostState::unwritten) held += bytes;
    if (state == HostState::shared) shared += bytes;
  }
};

/// The host's extents of a file, asked for at ascending offsets: few at a time where what is wanted
/// lies far apart, many where it lies side by side.
class HostLookup {
 public:
  using Use = std::function<bool(Range part, HostState state, uint32_t flags)>;

  /// `fd` is -1 where the file is not open: then everything is unknown.
  HostLookup(int fd, ExtentMethod method) : fd_(fd), method_(method) {}

  /// Calls `use` for each part of `range` in order, until it returns false. Nothing behind `limit`
  /// is asked for.
  Status find(Range range, uint64_t limit, const CancelFlag& cancel, const Use& use);

  /// Adds up what of `range` has no blocks, and what another file shares.
  Status addLacking(Range range, uint64_t limit, const CancelFlag& cancel, Lacking* lacking);

 private:
  Status load(uint64_t from, uint64_t limit, const CancelFlag& cancel);
  void seek(uint64_t offset);

  int fd_;
  ExtentMethod method_;
  ExtentPage page_;
  uint64_t start_ = 0;  ///< what page_ covers
  uint64_t end_ = 0;
  size_t at_ = 0;
  size_t budget_ = 0;
};

/// What a guest range is to both sides. The numbers cross into JavaScript (lib/extent.ts holds the
/// same order): the first four alone; of the others, five of the host's for each.
enum class JoinedState : uint8_t {
  below = 13,       ///< content comes from the backing file
  unmapped = 14,    ///< nothing there, and no backing file
  zeros = 15,       ///< reads as zeros, without storage
  compressed = 16,  ///< packed among others; a write moves it
  data = 17,
  zeroed = 22,         ///< reads as zeros, with storage
  part = 27,           ///< nothing there, in a cluster that has storage
  snapshotData = 32,   ///< the same as `data`, and a snapshot has it too: a write moves it
  snapshotZeros = 37,  ///< the same as `zeroed`
  kept = 42,           ///< the same as `zeroed`, and stays marked as zeros
  snapshotKept = 47,
};

/// Guest extents, each with one state on the host.
struct JoinedPage {
  std::vector<double> offset;
  std::vector<double> length;
  std::vector<double> host;     ///< byte offset in the container or data file; -1 for none
  std::vector<uint8_t> state;   ///< JoinedState, plus HostState from `data` on
  std::vector<uint32_t> flags;  ///< FIEMAP_EXTENT_*
  uint64_t next = 0;            ///< where the following page starts
  bool cancelled = false;

  size_t size() const { return offset.size(); }
};

/// Descriptors of what an image consists of.
struct HostFiles {
  int fd = -1;
  ExtentMethod method = ExtentMethod::fiemap;
  int dataFd = -1;  ///< the external data file, where it is open
  ExtentMethod dataMethod = ExtentMethod::fiemap;
};

/// Reads about `maxExtents` extents of a guest range, at most five times as many. Memory is bounded
/// by that, however scattered the clusters lie.
Outcome readJoined(const Image& image, const HostFiles& files, Range range, size_t maxExtents,
                   const CancelFlag& cancel, JoinedPage* page);

/// Whether the container has fewer blocks (`hostBytes`) than clusters in use: then `qemu-img map`
/// asks the host what its clusters are.
Outcome looksPreallocated(Io& io, const Image& image, uint64_t hostBytes, const CancelFlag& cancel,
                          bool* preallocated);

}  // namespace thicken::qcow2
