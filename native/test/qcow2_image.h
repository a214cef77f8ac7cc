#pragma once

#include <vector>

#include "../qcow2/bytes.h"
#include "../qcow2/geometry.h"
#include "../qcow2/refcounts.h"

namespace thicken_test {

/// An empty image, as small as the format allows: header, refcount table, one refcount block, L1.
struct ImageOptions {
  uint32_t version = 3;
  uint32_t clusterBits = 9;
  uint32_t refcountOrder = 4;
  uint64_t virtualSize = 1 << 20;
  uint64_t incompatible = 0;
  uint64_t compatible = 0;
  uint64_t autoclear = 0;
};

inline std::vector<uint8_t> makeImage(const ImageOptions& options) {
  using namespace thicken::qcow2;
  Geometry geometry;
  geometry.clusterBits = options.clusterBits;
  geometry.extended = (options.incompatible & kExtendedL2Bit) != 0;
  const uint64_t size = geometry.clusterSize();
  const uint64_t tables = (options.virtualSize + geometry.tableSpan() - 1) / geometry.tableSpan();
  const uint64_t l1Clusters = geometry.clustersFor(tables * 8);
  std::vector<uint8_t> bytes((3 + l1Clusters) * size);
  store32(&bytes[0], 0x514649fb);
  store32(&bytes[4], options.version);
  store32(&bytes[20], options.clusterBits);
  store64(&bytes[24], options.virtualSize);
  store32(&bytes[36], static_cast<uint32_t>(tables));
  store64(&bytes[40], 3 * size);
  store64(&bytes[48], size);
  store32(&bytes[56], 1);
  if (options.version == 3) {
    store64(&bytes[72], options.incompatible);
    store64(&bytes[80], options.compatible);
    store64(&bytes[88], options.autoclear);
    store32(&bytes[96], options.refcountOrder);
    store32(&bytes[100], 104);
  }
  store64(&bytes[size], 2 * size);
  for (uint64_t i = 0; i < 3 + l1Clusters; i++)
    setCount(&bytes[2 * size], options.version == 3 ? options.refcountOrder : 4, i, 1);
  return bytes;
}

}  // namespace thicken_test
