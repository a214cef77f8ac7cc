#include <algorithm>

#include "allocate.h"

namespace thicken::qcow2 {
namespace {

constexpr size_t kMostLacking = 1u << 20;
constexpr uint64_t kWritePiece = 1u << 20;

Range between(uint64_t from, uint64_t to) { return Range{from, from < to ? to - from : 0}; }

}  // namespace

// A copy that leaves holes out, or shares blocks with its source, does so under tables too: zero
// parts of them are holes, although a write of the guest's changes them. Of a cluster that holds
// compressed data the rest may be a hole in any image.
Outcome Allocator::measureTables(const HostFiles& files, const CancelFlag& cancel,
                                 HostNeeds* needs) {
  // A request for nothing changes nothing.
  if (rules_->clusters().count == 0) return {};
  const uint64_t l1End = image_.header.l1Offset + uint64_t{image_.header.l1Entries} * 8;
  const uint64_t padEnd = bytes(image_.geometry.clustersFor(l1End));
  HostLookup host(files.fd, files.method);
  Lacking lacking;
  const auto use = [&](Range part, HostState state, uint32_t) {
    lacking.add(state, part.length);
    const bool shared = state == HostState::shared;
    // What there is no room for is found by the next run.
    if ((shared || state == HostState::hole) && lacking_.size() < kMostLacking)
      lacking_.push_back(Part{part, shared});
    return true;
  };
  for (const ClusterRun& run : survey_.tables) {
    if (cancel.isSet()) break;
    // What follows the L1 table in its last cluster is never written: qemu-img leaves it out.
    const Range parts[] = {between(bytes(run.first), std::min(bytes(run.end()), l1End)),
                           between(std::max(bytes(run.first), padEnd), bytes(run.end()))};
    for (const Range& range : parts) {
      Status status = host.find(range, range.end(), cancel, use);
      if (!status.ok()) return Outcome::of(status);
    }
  }
  // Once what was compressed has moved, its cluster is free, and QEMU takes it for another.
  for (const ClusterRun& run : survey_.packed) {
    if (needed_.reserve == 0 || cancel.isSet()) break;
    const Range range{bytes(run.first), bytes(run.count)};
    Status status = host.find(range, range.end(), cancel, use);
    if (!status.ok()) return Outcome::of(status);
  }
  needs->later += lacking.holes;
  needs->unreserved += lacking.holes;
  needs->sharedTables += lacking.shared;
  return {};
}

Outcome Allocator::provideTables(const CancelFlag& cancel, Progress* progress) {
  for (const Part& part : lacking_) {
    Outcome outcome = poll(cancel, progress);
    if (!outcome.ok() || progress->stopped()) return outcome;
    Status status = part.shared ? file_.unshare(part.range) : file_.reserve(part.range, true);
    outcome = Outcome::of(status);
    if (status.error == EOPNOTSUPP) {
      progress->reserved = false;
      outcome = part.shared ? Outcome{} : writeHole(part.range, cancel, progress);
    }
    if (!outcome.ok() || progress->stopped()) return outcome;
  }
  lacking_.clear();
  return {};
}

// Without fallocate(2), zeros are what a hole can be written with, also where the file ends within
// its last table; what is not zero by now has blocks.
Outcome Allocator::writeHole(Range hole, const CancelFlag& cancel, Progress* progress) {
  std::vector<uint8_t> content(kWritePiece);
  for (uint64_t at = hole.offset; at < hole.end(); at += kWritePiece) {
    Outcome outcome = poll(cancel, progress);
    if (!outcome.ok() || progress->stopped()) return outcome;
    const Range piece{at, std::min(kWritePiece, hole.end() - at)};
    Status status = readPadded(file_, piece, content.data());
    const auto last = content.begin() + static_cast<ptrdiff_t>(piece.length);
    const bool zero = std::all_of(content.begin(), last, [](uint8_t byte) { return byte == 0; });
    if (status.ok() && zero) status = file_.writeZeros(piece);
    if (!status.ok()) return Outcome::of(status);
    if (zero) image_.fileSize = std::max(image_.fileSize, piece.end());
  }
  return {};
}

}  // namespace thicken::qcow2
