#include <algorithm>

#include "host.h"
#include "refcounts.h"

namespace thicken::qcow2 {

// QEMU's own rule (qcow2_detect_metadata_preallocation, 7.2): a ninth more clusters than blocks.
Outcome looksPreallocated(Io& io, const Image& image, uint64_t hostBytes, const CancelFlag& cancel,
                          bool* preallocated) {
  *preallocated = false;
  const Geometry& geometry = image.geometry;
  const uint64_t real = hostBytes >> geometry.clusterBits;
  const uint64_t threshold = std::max(real * 10 / 9, real + 2);
  const uint64_t end = geometry.clustersFor(image.fileSize);
  const uint64_t entries = geometry.blockEntries();
  std::vector<uint8_t> block(geometry.clusterSize());
  uint64_t counted = 0;
  for (uint64_t first = 0; first < end && counted < threshold && !cancel.isSet();
       first += entries) {
    const uint64_t index = first / entries;
    if (index >= image.refcountTable.size()) break;
    if (image.refcountTable[index] == 0) continue;
    const Range place{image.refcountTable[index], block.size()};
    Status status = readPadded(io, place, block.data());
    if (!status.ok()) return Outcome::of(status);
    const uint64_t count = std::min(entries, end - first);
    for (uint64_t i = 0; i < count; i++)
      if (getCount(block.data(), geometry.refcountOrder, i) != 0) counted++;
  }
  *preallocated = counted >= threshold;
  return {};
}

}  // namespace thicken::qcow2
