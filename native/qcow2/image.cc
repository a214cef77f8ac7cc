#include <algorithm>

#include "bytes.h"
#include "header.h"

namespace thicken::qcow2 {
namespace {

Outcome outside(const char* what, Range where) {
  return Outcome::refused(Code::outsideFile,
                          std::string(what) + " lies outside the file; `qemu-img check` tells more",
                          where);
}

// Tables begin on a cluster, behind the header, and end within the file.
Outcome checkTable(const Image& image, const char* what, Range where) {
  if (where.length == 0) return {};
  if (!image.geometry.isAligned(where.offset) || where.offset == 0)
    return Outcome::refused(Code::corrupt, std::string(what) + " does not start on a cluster",
                            where);
  if (!image.contains(where)) return outside(what, where);
  return {};
}

Geometry geometryOf(const Header& header) {
  Geometry geometry;
  geometry.clusterBits = header.clusterBits;
  geometry.refcountOrder = header.refcountOrder;
  geometry.version = header.version;
  geometry.extended = (header.incompatible & kExtendedL2Bit) != 0;
  geometry.externalData = (header.incompatible & kExternalDataBit) != 0;
  geometry.virtualSize = header.virtualSize;
  return geometry;
}

// The last cluster of a file may be cut short where only zeros would follow.
Outcome checkTables(const Image& image) {
  const Header& header = image.header;
  const uint64_t size = image.geometry.clusterSize();
  Outcome outcome =
      checkTable(image, "the L1 table", Range{header.l1Offset, uint64_t{header.l1Entries} * 8});
  if (outcome.ok())
    outcome = checkTable(
        image, "the refcount table",
        Range{header.refcountTableOffset, uint64_t{header.refcountTableClusters} * size});
  if (outcome.ok()) outcome = checkTable(image, "the encryption header", header.luks);
  if (outcome.ok()) outcome = checkTable(image, "the bitmap directory", header.bitmapDirectory);
  return outcome;
}

Outcome checkL1(const Image& image) {
  const Geometry& geometry = image.geometry;
  const uint64_t needed = geometry.virtualSize / geometry.tableSpan() +
                          (geometry.virtualSize % geometry.tableSpan() != 0);
  if (image.l1.size() < needed)
    return Outcome::refused(Code::corrupt, "the L1 table is too small for the virtual size",
                            Range{36, 4});
  for (size_t i = 0; i < image.l1.size(); i++) {
    const uint64_t entry = image.l1[i];
    const uint64_t offset = entry & kOffsetMask;
    const Range where{image.header.l1Offset + i * 8, 8};
    if ((entry & kL1Reserved) != 0 || (offset == 0 && entry != 0) || !geometry.isAligned(offset))
      return Outcome::refused(Code::corrupt, "L1 entry " + std::to_string(i) + " is invalid",
                              where);
    if (offset != 0 && !image.contains(Range{offset, geometry.clusterSize()}))
      return outside("an L2 table", where);
  }
  return {};
}

Outcome checkRefcountTable(const Image& image) {
  for (size_t i = 0; i < image.refcountTable.size(); i++) {
    const uint64_t offset = image.refcountTable[i];
    const Range where{image.header.refcountTableOffset + i * 8, 8};
    if ((offset & kRefcountReserved) != 0 || !image.geometry.isAligned(offset))
      return Outcome::refused(Code::corrupt,
                              "refcount table entry " + std::to_string(i) + " is invalid", where);
    if (offset != 0 && offset >= image.fileSize) return outside("a refcount block", where);
  }
  return {};
}

Outcome readFirstCluster(Io& io, std::vector<uint8_t>* data) {
  constexpr uint64_t kLargestCluster = 2ull << 20;
  uint64_t size = 0;
  Status status = io.size(&size);
  if (!status.ok()) return Outcome::of(status);
  data->resize(std::min(size, kLargestCluster));
  size_t got = 0;
  status = io.read(Range{0, data->size()}, data->data(), &got);
  data->resize(got);
  return Outcome::of(status);
}

}  // namespace

Outcome readWords(Io& io, uint64_t offset, uint64_t entries, std::vector<uint64_t>* words) {
  words->resize(entries);
  if (entries == 0) return {};
  Status status = readPadded(io, Range{offset, entries * 8}, words->data());
  for (uint64_t& word : *words) word = be64toh(word);
  return Outcome::of(status);
}

Outcome openImage(Io& io, Image* image) {
  *image = Image{};
  std::vector<uint8_t> first;
  Outcome outcome = readFirstCluster(io, &first);
  if (outcome.ok()) outcome = parseHeader(first, &image->header);
  if (!outcome.ok()) return outcome;
  image->geometry = geometryOf(image->header);
  outcome = Outcome::of(io.size(&image->fileSize));
  if (outcome.ok()) outcome = checkTables(*image);
  const Header& header = image->header;
  if (outcome.ok()) outcome = readWords(io, header.l1Offset, header.l1Entries, &image->l1);
  if (outcome.ok()) outcome = checkL1(*image);
  const uint64_t blocks =
      uint64_t{header.refcountTableClusters} * image->geometry.clusterSize() / 8;
  if (outcome.ok())
    outcome = readWords(io, header.refcountTableOffset, blocks, &image->refcountTable);
  if (outcome.ok()) outcome = checkRefcountTable(*image);
  return outcome.ok() ? readSnapshots(io, image) : outcome;
}

}  // namespace thicken::qcow2
