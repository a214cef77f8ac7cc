#include "header.h"

#include "bytes.h"

namespace thicken::qcow2 {
namespace {

constexpr uint32_t kMagic = 0x514649fb;
constexpr uint32_t kVersion2Length = 72;
constexpr uint32_t kVersion3Length = 104;
constexpr uint32_t kCompressionTypeAt = 104;
constexpr uint32_t kKnownLength = 112;  // the compression type and its padding
constexpr uint32_t kMinClusterBits = 9;
constexpr uint32_t kMaxClusterBits = 21;
constexpr uint32_t kMinExtendedClusterBits = 14;
constexpr uint32_t kMaxRefcountOrder = 6;
constexpr uint32_t kMaxBackingName = 1023;
constexpr uint32_t kMaxSnapshots = 65536;

constexpr uint64_t kKnownIncompatible =
    kDirtyBit | kCorruptBit | kExternalDataBit | kCompressionBit | kExtendedL2Bit;

Outcome corrupt(std::string what, uint64_t offset, uint64_t length) {
  return Outcome::refused(Code::corrupt, std::move(what), Range{offset, length});
}

void readCommonFields(const uint8_t* at, Header* header) {
  header->version = load32(at + 4);
  header->clusterBits = load32(at + 20);
  header->virtualSize = load64(at + 24);
  header->cryptMethod = load32(at + 32);
  header->l1Entries = load32(at + 36);
  header->l1Offset = load64(at + 40);
  header->refcountTableOffset = load64(at + kRefcountTableField);
  header->refcountTableClusters = load32(at + 56);
  header->snapshotCount = load32(at + 60);
  header->snapshotsOffset = load64(at + 64);
}

Outcome readVersion3Fields(const std::vector<uint8_t>& data, Header* header) {
  if (data.size() < kVersion3Length)
    return Outcome::refused(Code::notQcow2, "the file ends within its qcow2 header");
  const uint8_t* at = data.data();
  header->incompatible = load64(at + 72);
  header->compatible = load64(at + 80);
  header->autoclear = load64(at + kAutoclearField);
  header->refcountOrder = load32(at + 96);
  header->headerLength = load32(at + 100);
  if (header->headerLength < kVersion3Length || header->headerLength % 8 != 0 ||
      header->headerLength > data.size())
    return corrupt("header length " + std::to_string(header->headerLength), 100, 4);
  if (header->headerLength > kCompressionTypeAt) header->compressionType = at[kCompressionTypeAt];
  for (uint32_t i = kCompressionTypeAt + 1; i < header->headerLength; i++)
    if (at[i] != 0) header->allKnown = false;
  if (header->headerLength > kKnownLength) header->allKnown = false;
  return {};
}

Outcome checkFeatures(Header* header) {
  const uint64_t unknown = header->incompatible & ~kKnownIncompatible;
  if (unknown != 0) {
    uint32_t bit = 0;
    while ((unknown >> bit & 1) == 0) bit++;
    return Outcome::refused(
        Code::unknownFeature,
        "incompatible feature bit " + std::to_string(bit) + " is of a later version of qcow2",
        Range{72, 8});
  }
  if ((header->compatible & ~kLazyRefcountsBit) != 0) header->allKnown = false;
  if ((header->autoclear & ~(kBitmapsBit | kRawDataBit)) != 0) header->allKnown = false;
  const bool other = header->compressionType != 0;
  if (other != ((header->incompatible & kCompressionBit) != 0))
    return corrupt("the compression type contradicts its feature bit", 72, 8);
  if (header->compressionType > 1)
    return Outcome::refused(Code::unknownFeature,
                            "compression type " + std::to_string(header->compressionType));
  const bool external = (header->incompatible & kExternalDataBit) != 0;
  if ((header->autoclear & kRawDataBit) != 0 && !external)
    return corrupt("a raw data file without the external data bit", kAutoclearField, 8);
  return {};
}

Outcome checkSizes(const Header& header) {
  const bool extended = (header.incompatible & kExtendedL2Bit) != 0;
  const uint32_t least = extended ? kMinExtendedClusterBits : kMinClusterBits;
  if (header.clusterBits < least || header.clusterBits > kMaxClusterBits)
    return Outcome::refused(Code::absurd,
                            "cluster size 2^" + std::to_string(header.clusterBits) + " bytes",
                            Range{20, 4});
  if (header.refcountOrder > kMaxRefcountOrder)
    return Outcome::refused(Code::absurd, "refcount order " + std::to_string(header.refcountOrder),
                            Range{96, 4});
  if (header.virtualSize > kMaxHostEnd)
    return Outcome::refused(Code::absurd, "virtual size beyond 2^56 bytes", Range{24, 8});
  if (uint64_t{header.l1Entries} * 8 > kMaxL1Bytes)
    return Outcome::refused(Code::absurd, "an L1 table of more than 32 MiB", Range{36, 4});
  if (uint64_t{header.refcountTableClusters} << header.clusterBits > kMaxRefcountTableBytes)
    return Outcome::refused(Code::absurd, "a refcount table of more than 8 MiB", Range{56, 4});
  if (header.snapshotCount > kMaxSnapshots)
    return Outcome::refused(Code::absurd, std::to_string(header.snapshotCount) + " snapshots",
                            Range{60, 4});
  if (header.cryptMethod > 2)
    return Outcome::refused(
        Code::unsupported, "encryption method " + std::to_string(header.cryptMethod), Range{32, 4});
  if (header.refcountTableClusters == 0) return corrupt("no refcount table", 56, 4);
  const bool external = (header.incompatible & kExternalDataBit) != 0;
  if (external && header.snapshotCount > 0)
    return corrupt("snapshots in an image with an external data file", 60, 4);
  return {};
}

Outcome readBackingName(const std::vector<uint8_t>& data, Header* header) {
  const uint64_t offset = load64(data.data() + 8);
  const uint32_t length = load32(data.data() + 16);
  if (offset == 0) return {};
  if (length > kMaxBackingName)
    return Outcome::refused(
        Code::absurd, "a backing file name of " + std::to_string(length) + " bytes", Range{16, 4});
  if (offset < header->headerLength || offset > data.size() || length > data.size() - offset)
    return Outcome::refused(Code::outsideFile,
                            "the backing file name lies outside the first cluster", Range{8, 8});
  header->hasBacking = true;
  header->backingFile.assign(data.begin() + static_cast<ptrdiff_t>(offset),
                             data.begin() + static_cast<ptrdiff_t>(offset + length));
  return {};
}

}  // namespace

Outcome parseHeader(const std::vector<uint8_t>& data, Header* header) {
  *header = Header{};
  if (data.size() < kVersion2Length || load32(data.data()) != kMagic)
    return Outcome::refused(Code::notQcow2, "no qcow2 header");
  readCommonFields(data.data(), header);
  if (header->version < 2 || header->version > 3)
    return Outcome::refused(Code::unsupported, "qcow2 version " + std::to_string(header->version),
                            Range{4, 4});
  Outcome outcome;
  if (header->version == 3) outcome = readVersion3Fields(data, header);
  if (outcome.ok()) outcome = checkFeatures(header);
  if (outcome.ok()) outcome = checkSizes(*header);
  if (outcome.ok() && data.size() > 1ull << header->clusterBits) {
    const std::vector<uint8_t> cluster(data.begin(), data.begin() + (1ll << header->clusterBits));
    if (header->headerLength > cluster.size())
      return corrupt("header length " + std::to_string(header->headerLength), 100, 4);
    outcome = readBackingName(cluster, header);
    return outcome.ok() ? parseExtensions(cluster, header) : outcome;
  }
  if (outcome.ok()) outcome = readBackingName(data, header);
  return outcome.ok() ? parseExtensions(data, header) : outcome;
}

Outcome checkWritable(const Header& header) {
  if ((header.incompatible & kCorruptBit) != 0)
    return Outcome::refused(Code::corruptBit,
                            "the image is marked as corrupt; repair it with `qemu-img check -r "
                            "all` after making a copy");
  if ((header.incompatible & kDirtyBit) != 0)
    return Outcome::refused(Code::dirty,
                            "the image was not closed properly and its reference counts may be "
                            "wrong; repair them with `qemu-img check -r all`");
  return {};
}

}  // namespace thicken::qcow2
