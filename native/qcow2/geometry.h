#pragma once

#include <cstdint>

namespace thicken::qcow2 {

// Entries of the L1 and L2 tables.
constexpr uint64_t kCopied = 1ull << 63;
constexpr uint64_t kCompressed = 1ull << 62;
constexpr uint64_t kZero = 1;
constexpr uint64_t kOffsetMask = 0x00fffffffffffe00;
constexpr uint64_t kL1Reserved = 0x7f000000000001ff;
constexpr uint64_t kL2Reserved = 0x3f000000000001fe;
constexpr uint64_t kRefcountReserved = 0x1ff;
constexpr uint64_t kSectorSize = 512;
// Host offsets have 56 bits.
constexpr uint64_t kMaxHostEnd = 1ull << 56;
// What QEMU opens at most.
constexpr uint64_t kMaxL1Bytes = 32ull << 20;
constexpr uint64_t kMaxRefcountTableBytes = 8ull << 20;

constexpr uint32_t kSubclusters = 32;
constexpr uint64_t kAllAllocated = 0x00000000ffffffff;
constexpr uint64_t kAllZero = 0xffffffff00000000;

/// The sizes that follow from a header.
struct Geometry {
  uint32_t clusterBits = 16;
  uint32_t refcountOrder = 4;
  uint32_t version = 3;
  bool extended = false;      ///< L2 entries with subclusters
  bool externalData = false;  ///< guest clusters lie in another file, at their own offsets
  uint64_t virtualSize = 0;

  uint64_t clusterSize() const { return 1ull << clusterBits; }
  uint64_t entrySize() const { return extended ? 16 : 8; }
  uint64_t tableEntries() const { return clusterSize() / entrySize(); }
  /// Guest bytes that one L2 table describes.
  uint64_t tableSpan() const { return tableEntries() << clusterBits; }
  uint64_t blockEntries() const { return (clusterSize() * 8) >> refcountOrder; }
  uint64_t refcountMax() const {
    return refcountOrder == 6 ? ~0ull : (1ull << (1u << refcountOrder)) - 1;
  }
  uint64_t clustersFor(uint64_t bytes) const {
    return (bytes >> clusterBits) + ((bytes & (clusterSize() - 1)) != 0);
  }
  uint64_t guestClusters() const { return clustersFor(virtualSize); }
  /// Where a range of the virtual disk ends, clipped to its size.
  uint64_t clippedEnd(uint64_t offset, uint64_t length) const {
    if (offset >= virtualSize || length > virtualSize - offset) return virtualSize;
    return offset + length;
  }
  bool isAligned(uint64_t offset) const { return (offset & (clusterSize() - 1)) == 0; }
  uint64_t subclusterSize() const { return clusterSize() / kSubclusters; }
};

/// Host clusters that follow each other.
struct ClusterRun {
  uint64_t first = 0;
  uint64_t count = 0;

  uint64_t end() const { return first + count; }
};

}  // namespace thicken::qcow2
