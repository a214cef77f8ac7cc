#include "bytes.h"
#include "header.h"

namespace thicken::qcow2 {
namespace {

constexpr uint64_t kFixedLength = 40;
constexpr uint32_t kMaxExtra = 1024;
constexpr uint64_t kMaxTable = 64ull << 20;

Outcome outside(uint64_t at) {
  return Outcome::refused(Code::outsideFile, "the snapshot table lies outside the file",
                          Range{at, kFixedLength});
}

// What follows the fixed part: extra data, then the id and the name.
Outcome readRest(Io& io, const Image& image, const uint8_t* fixed, uint64_t at, uint64_t* length,
                 Snapshot* snapshot) {
  const uint32_t extra = load32(fixed + 36);
  const uint32_t idLength = load16(fixed + 12);
  const uint32_t nameLength = load16(fixed + 14);
  if (extra > kMaxExtra)
    return Outcome::refused(Code::absurd,
                            "a snapshot with " + std::to_string(extra) + " bytes of extra data",
                            Range{at, kFixedLength});
  *length = uint64_t{extra} + idLength + nameLength;
  if (!image.contains(Range{at, kFixedLength + *length})) return outside(at);
  std::vector<uint8_t> rest(*length);
  Status status = readPadded(io, Range{at + kFixedLength, *length}, rest.data());
  if (!status.ok()) return Outcome::of(status);
  if (extra >= 8) snapshot->vmStateSize = load64(rest.data());
  if (extra >= 16) snapshot->virtualSize = load64(rest.data() + 8);
  const auto names = rest.begin() + static_cast<ptrdiff_t>(extra);
  snapshot->id.assign(names, names + static_cast<ptrdiff_t>(idLength));
  snapshot->name.assign(names + static_cast<ptrdiff_t>(idLength), rest.end());
  return {};
}

Outcome checkL1(const Image& image, const Snapshot& snapshot, uint64_t at) {
  const Range l1{snapshot.l1Offset, uint64_t{snapshot.l1Entries} * 8};
  if (l1.length > kMaxL1Bytes)
    return Outcome::refused(Code::absurd, "a snapshot's L1 table of more than 32 MiB",
                            Range{at, kFixedLength});
  if (l1.length == 0) return {};
  if (!image.geometry.isAligned(l1.offset) || l1.offset == 0)
    return Outcome::refused(Code::corrupt, "a snapshot's L1 table does not start on a cluster",
                            Range{at, kFixedLength});
  return image.contains(l1) ? Outcome{} : outside(at);
}

}  // namespace

Outcome readSnapshots(Io& io, Image* image) {
  const uint64_t start = image->header.snapshotsOffset;
  uint64_t at = start;
  if (image->header.snapshotCount == 0) return {};
  if (!image->geometry.isAligned(start) || start == 0)
    return Outcome::refused(Code::corrupt, "the snapshot table does not start on a cluster",
                            Range{64, 8});
  for (uint32_t i = 0; i < image->header.snapshotCount; i++) {
    uint8_t fixed[kFixedLength];
    if (!image->contains(Range{at, kFixedLength})) return outside(at);
    Status status = readPadded(io, Range{at, kFixedLength}, fixed);
    if (!status.ok()) return Outcome::of(status);
    Snapshot snapshot;
    snapshot.l1Offset = load64(fixed);
    snapshot.l1Entries = load32(fixed + 8);
    snapshot.vmStateSize = load32(fixed + 32);
    uint64_t rest = 0;
    Outcome outcome = readRest(io, *image, fixed, at, &rest, &snapshot);
    if (outcome.ok()) outcome = checkL1(*image, snapshot, at);
    if (!outcome.ok()) return outcome;
    image->snapshots.push_back(std::move(snapshot));
    const uint64_t end = at + kFixedLength + rest;
    at += (kFixedLength + rest + 7) & ~7ull;
    image->snapshotTable = Range{start, end - start};
    if (image->snapshotTable.length > kMaxTable)
      return Outcome::refused(Code::absurd, "a snapshot table of more than 64 MiB", Range{60, 12});
  }
  return {};
}

}  // namespace thicken::qcow2
