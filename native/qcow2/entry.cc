#include "entry.h"

namespace thicken::qcow2 {
namespace {

const char* compressedFault(const Image& image, Entry entry) {
  const Geometry& geometry = image.geometry;
  if (geometry.externalData) return "a compressed cluster beside an external data file";
  if (entry.isCopied()) return "a compressed cluster marked as not shared";
  if (geometry.extended && entry.bitmap != 0) return "a compressed cluster with subclusters";
  const Range host = compressedRange(geometry, entry);
  if (host.offset >= image.fileSize || host.offset < geometry.clusterSize())
    return "a compressed cluster outside the file";
  if (geometry.clustersFor(host.end()) > image.hostClusters())
    return "a compressed cluster outside the file";
  return nullptr;
}

const char* subclusterFault(const Geometry& geometry, Entry entry) {
  if (!geometry.extended) return nullptr;
  if ((entry.allocated() & entry.zeroed()) != 0) return "a subcluster both allocated and zero";
  if (entry.isZero()) return "a reserved bit in an L2 entry";
  if (entry.allocated() != 0 && !entry.hasHost(geometry.externalData))
    return "allocated subclusters without a cluster";
  return nullptr;
}

}  // namespace

const char* entryFault(const Image& image, Entry entry, uint64_t guestCluster) {
  if ((entry.word | entry.bitmap) == 0) return nullptr;
  const Geometry& geometry = image.geometry;
  if (entry.isCompressed()) return compressedFault(image, entry);
  if ((entry.word & kL2Reserved) != 0) return "a reserved bit in an L2 entry";
  if (entry.isZero() && geometry.version < 3) return "a zero cluster in an image of version 2";
  if (const char* fault = subclusterFault(geometry, entry)) return fault;
  const uint64_t offset = entry.offset();
  if (!geometry.isAligned(offset)) return "a cluster that is not aligned";
  if (geometry.externalData) {
    if (entry.hasHost(true) && offset != guestCluster << geometry.clusterBits)
      return "a cluster at another offset of the external data file";
    return nullptr;
  }
  if (offset == 0) return entry.isCopied() ? "a cluster at offset 0" : nullptr;
  if (offset >> geometry.clusterBits >= image.hostClusters()) return "a cluster outside the file";
  return nullptr;
}

}  // namespace thicken::qcow2
