#pragma once

#include <algorithm>
#include <vector>

#include "../qcow2/entry.h"

namespace thicken_test {

/// What a guest reads, by the tables below `l1`: a second, slow reader for comparisons. Compressed
/// clusters are told by their compressed bytes, what comes from a backing file by a mark.
class ContentReader {
 public:
  ContentReader(thicken::qcow2::Io& file, thicken::qcow2::Io& data,
                const thicken::qcow2::Image& image)
      : file_(file), data_(data), image_(image), absent_(image.header.hasBacking ? 0xbb : 0) {}

  /// Nothing comes from the backing file.
  void setBackingIsEmpty() { absent_ = 0; }

  std::vector<uint8_t> read(const std::vector<uint64_t>& l1, uint64_t clusters) {
    const uint64_t size = image_.geometry.clusterSize();
    std::vector<uint8_t> content(clusters * size);
    std::vector<uint8_t> table(size);
    for (uint64_t i = 0; i < clusters; i++) {
      const uint64_t entries = image_.geometry.tableEntries();
      const uint64_t place =
          i / entries < l1.size() ? l1[i / entries] & thicken::qcow2::kOffsetMask : 0;
      if (place == 0) {
        readCluster(thicken::qcow2::Entry{}, content.data() + i * size);
        continue;
      }
      if (i % entries == 0) readPadded(file_, thicken::Range{place, size}, table.data());
      readCluster(thicken::qcow2::loadEntry(image_.geometry, table.data(), i % entries),
                  content.data() + i * size);
    }
    return content;
  }

  std::vector<uint8_t> active() { return read(image_.l1, image_.geometry.guestClusters()); }

  std::vector<uint8_t> snapshot(const thicken::qcow2::Snapshot& snapshot) {
    std::vector<uint64_t> l1;
    readWords(file_, snapshot.l1Offset, snapshot.l1Entries, &l1);
    return read(l1, std::min(image_.geometry.guestClusters(),
                             snapshot.l1Entries * image_.geometry.tableEntries()));
  }

 private:
  void readCluster(thicken::qcow2::Entry entry, uint8_t* to) {
    const thicken::qcow2::Geometry& geometry = image_.geometry;
    const uint64_t size = geometry.clusterSize();
    if (entry.isCompressed()) {
      const thicken::Range host = compressedRange(geometry, entry);
      readPadded(file_, thicken::Range{host.offset, std::min(host.length, size)}, to);
      return;
    }
    const bool hasHost = entry.hasHost(geometry.externalData);
    std::fill(to, to + size, entry.isZero() ? uint8_t{0} : absent_);
    if (entry.isZero() || !hasHost) {
      for (uint32_t i = 0; i < 32 && geometry.extended; i++)
        if ((entry.zeroed() >> i & 1) != 0) fill(to, i, 0);
      return;
    }
    thicken::qcow2::Io& io = geometry.externalData ? data_ : file_;
    readPadded(io, thicken::Range{entry.offset(), size}, to);
    for (uint32_t i = 0; i < 32 && geometry.extended; i++) {
      if ((entry.allocated() >> i & 1) != 0) continue;
      fill(to, i, (entry.zeroed() >> i & 1) != 0 ? uint8_t{0} : absent_);
    }
  }

  void fill(uint8_t* cluster, uint32_t subcluster, uint8_t value) {
    const uint64_t size = image_.geometry.subclusterSize();
    std::fill(cluster + subcluster * size, cluster + (subcluster + 1) * size, value);
  }

  thicken::qcow2::Io& file_;
  thicken::qcow2::Io& data_;
  const thicken::qcow2::Image& image_;
  uint8_t absent_;
};

}  // namespace thicken_test
