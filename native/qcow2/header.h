#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "geometry.h"
#include "io.h"
#include "outcome.h"

namespace thicken::qcow2 {

// Feature bits.
constexpr uint64_t kDirtyBit = 1u << 0;
constexpr uint64_t kCorruptBit = 1u << 1;
constexpr uint64_t kExternalDataBit = 1u << 2;
constexpr uint64_t kCompressionBit = 1u << 3;
constexpr uint64_t kExtendedL2Bit = 1u << 4;
constexpr uint64_t kLazyRefcountsBit = 1u << 0;
constexpr uint64_t kBitmapsBit = 1u << 0;
constexpr uint64_t kRawDataBit = 1u << 1;

// Where the fields lie that allocation changes.
constexpr uint64_t kRefcountTableField = 48;
constexpr uint64_t kAutoclearField = 88;

struct Header {
  uint32_t version = 0;
  uint32_t clusterBits = 0;
  uint64_t virtualSize = 0;
  uint32_t cryptMethod = 0;  ///< 0 none, 1 AES, 2 LUKS
  uint32_t l1Entries = 0;
  uint64_t l1Offset = 0;
  uint64_t refcountTableOffset = 0;
  uint32_t refcountTableClusters = 0;
  uint32_t snapshotCount = 0;
  uint64_t snapshotsOffset = 0;
  uint64_t incompatible = 0;
  uint64_t compatible = 0;
  uint64_t autoclear = 0;
  uint32_t refcountOrder = 4;
  uint32_t headerLength = 72;
  uint32_t compressionType = 0;  ///< 0 zlib, 1 zstd

  bool hasBacking = false;
  std::string backingFile;    ///< as it stands in the image
  std::string backingFormat;  ///< empty where the image records none
  std::string dataFile;       ///< external data file's name; empty where none is recorded
  Range luks;                 ///< length 0 where there is none
  uint32_t bitmapCount = 0;
  Range bitmapDirectory;
  bool hasBitmaps = false;  ///< the extension is there, consistent or not
  bool allKnown = true;     ///< no extension, field or feature bit that this code does not know
};

struct Snapshot {
  uint64_t l1Offset = 0;
  uint32_t l1Entries = 0;
  std::string id;
  std::string name;
  uint64_t vmStateSize = 0;
  uint64_t virtualSize = 0;  ///< 0 where the image (version 2) does not record it
};

/// An image's header and first-level tables, all checked.
struct Image {
  Header header;
  Geometry geometry;
  uint64_t fileSize = 0;
  std::vector<uint64_t> l1;
  std::vector<uint64_t> refcountTable;
  std::vector<Snapshot> snapshots;
  Range snapshotTable;

  /// Host clusters that something may refer to: QEMU lets one begin where the file ends.
  uint64_t hostClusters() const { return geometry.clustersFor(fileSize) + 1; }
  bool contains(Range range) const {
    return range.length <= fileSize && range.offset <= fileSize - range.length;
  }
};

/// Reads and checks the header, its extensions, the L1 and refcount tables and the snapshot table.
/// Reads only; the dirty and corrupt bits are no obstacle to it.
Outcome openImage(Io& io, Image* image);

/// Refuses what must not be written: the dirty and corrupt bits.
Outcome checkWritable(const Header& header);

/// Parses the header in `data`, the file's first bytes (a cluster, or all there is).
Outcome parseHeader(const std::vector<uint8_t>& data, Header* header);
Outcome parseExtensions(const std::vector<uint8_t>& data, Header* header);

Outcome readSnapshots(Io& io, Image* image);

/// Reads `entries` big-endian numbers of 64 bits.
Outcome readWords(Io& io, uint64_t offset, uint64_t entries, std::vector<uint64_t>* words);

}  // namespace thicken::qcow2
