#pragma once

#include <cstdint>
#include <vector>

#include "../cancel.h"
#include "entry.h"
#include "tables.h"

namespace thicken::qcow2 {

/// What the image says about a guest range. The numbers cross into JavaScript.
enum class GuestState : uint8_t {
  unallocated = 0,    ///< content is the backing file's, or zeros where there is none
  zeroPlain = 1,      ///< reads as zeros, without storage
  zeroAllocated = 2,  ///< reads as zeros, with storage of unknown content
  data = 3,
  compressed = 4,
};

constexpr uint8_t kShared = 1;    ///< a snapshot uses the cluster too: a write must move it
constexpr uint8_t kHasHost = 2;   ///< `host` is a place in the container or data file
constexpr uint8_t kExternal = 4;  ///< that place is in the external data file
constexpr uint8_t kStays = 8;     ///< of GuestState::zeroAllocated: allocation can't make it data

/// Consecutive guest extents without a gap between them, in struct-of-arrays form.
struct MapPage {
  std::vector<double> offset;
  std::vector<double> length;
  std::vector<double> host;  ///< byte offset of the storage; -1 where there is none
  std::vector<uint8_t> state;
  std::vector<uint8_t> flags;
  uint64_t next = 0;  ///< where the following page starts
  bool cancelled = false;

  size_t size() const { return offset.size(); }
};

/// Reads the active mapping, page by page. One range after the other is fastest: tables that were
/// read ahead are kept.
class MapReader {
 public:
  MapReader(Io& io, const Image& image) : image_(image), tables_(io, image, image.l1) {}

  /// Extents of `range` until `maxExtents` are collected or the range ends (page->next is then its
  /// end). Neighbours of one state, whose storage is contiguous too, are one extent. Compressed
  /// clusters have no `host`.
  Outcome read(Range range, size_t maxExtents, const CancelFlag& cancel, MapPage* page);

  /// Bytes of tables read at once.
  void setBatch(uint64_t bytes) { tables_.setBatch(bytes); }

 private:
  const Image& image_;
  TableReader tables_;
};

}  // namespace thicken::qcow2
