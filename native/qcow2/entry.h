#pragma once

#include <cstdint>

#include "bytes.h"
#include "header.h"

namespace thicken::qcow2 {

/// One L2 entry; `bitmap` is 0 where entries have no subclusters.
struct Entry {
  uint64_t word = 0;
  uint64_t bitmap = 0;

  bool isCompressed() const { return (word & kCompressed) != 0; }
  bool isCopied() const { return (word & kCopied) != 0; }
  bool isZero() const { return (word & kZero) != 0; }
  uint64_t offset() const { return word & kOffsetMask; }
  /// With an external data file, offset 0 is a place like any other.
  bool hasHost(bool externalData) const {
    return offset() != 0 || (externalData && isCopied() && !isCompressed());
  }
  uint32_t allocated() const { return static_cast<uint32_t>(bitmap); }
  uint32_t zeroed() const { return static_cast<uint32_t>(bitmap >> 32); }
};

inline Entry loadEntry(const Geometry& geometry, const uint8_t* table, uint64_t index) {
  if (!geometry.extended) return Entry{load64(table + index * 8), 0};
  return Entry{load64(table + index * 16), load64(table + index * 16 + 8)};
}

inline void storeEntry(const Geometry& geometry, uint8_t* table, uint64_t index, Entry entry) {
  store64(table + index * geometry.entrySize(), entry.word);
  if (geometry.extended) store64(table + index * 16 + 8, entry.bitmap);
}

/// The bytes of the file that a compressed cluster's sectors span.
inline Range compressedRange(const Geometry& geometry, Entry entry) {
  const uint32_t bits = 62 - (geometry.clusterBits - 8);
  const uint64_t offset = entry.word & ((1ull << bits) - 1);
  const uint64_t sectors = (entry.word & ~(kCopied | kCompressed)) >> bits;
  const uint64_t end = (offset & ~(kSectorSize - 1)) + (sectors + 1) * kSectorSize;
  return Range{offset, end - offset};
}

/// Neighbours in a table that say the same, of clusters that follow each other on the host or have
/// no place there.
struct EntryRun {
  Entry first;
  uint64_t count = 1;
  uint64_t step = 0;  ///< bytes from one place on the host to the next

  Entry at(uint64_t i) const { return Entry{first.word + i * step, first.bitmap}; }
};

/// Why the entry contradicts the specification or the image; nullptr where it does not.
/// `guestCluster` is the entry's place on the virtual disk.
const char* entryFault(const Image& image, Entry entry, uint64_t guestCluster);

/// The run that starts at `index` of a table that describes the guest from `guestStart` (a cluster)
/// on, and ends before `end`. entryFault() of its first entry goes for all: what they differ in is
/// an offset that grows, so that the last is the one to be out of bounds. A run that has such a one
/// is halved until it has none: cut to its first, a run of n entries would be read n times.
inline EntryRun loadRun(const Image& image, const uint8_t* table, uint64_t guestStart,
                        uint64_t index, uint64_t end) {
  const Geometry& geometry = image.geometry;
  EntryRun run{loadEntry(geometry, table, index)};
  if (run.first.isCompressed()) return run;
  if (run.first.hasHost(geometry.externalData)) run.step = geometry.clusterSize();
  const auto goesOn = [&](uint64_t count) {
    const Entry next = loadEntry(geometry, table, index + count);
    return next.word == run.at(count).word && next.bitmap == run.first.bitmap;
  };
  while (index + run.count < end && goesOn(run.count)) run.count++;
  const auto endsBeyond = [&] {
    const uint64_t last = run.count - 1;
    return last > 0 && entryFault(image, run.at(last), guestStart + index + last) != nullptr;
  };
  while (endsBeyond()) run.count /= 2;
  return run;
}

}  // namespace thicken::qcow2
