// Where a QEMU puts what it copies into the image before the rest of it is allocated here.
#include <algorithm>

#include "allocate.h"

namespace thicken::qcow2 {
namespace {

// What is copied at once (lib/qemu/rest-route.ts). QEMU wants free clusters for it that follow each
// other, and passes over fewer; the next search begins behind them (7.2, alloc_clusters_noref).
constexpr uint64_t kCopyBytes = 4u << 20;

}  // namespace

uint64_t Allocator::copiedClusters() const {
  return std::min(image_.geometry.clustersFor(request_.copied), needed_.data);
}

// Of `left` clusters, those that surely come to lie in a free run of the file.
uint64_t Allocator::surelyIn(ClusterRun run, uint64_t left) const {
  const uint64_t passed = std::max<uint64_t>(image_.geometry.clustersFor(kCopyBytes), 1) - 1;
  return std::min(left, run.count - std::min(passed, run.count));
}

// Free clusters within the file are taken first, from the lowest on.
Outcome Allocator::planCopies(const CancelFlag& cancel) {
  inside_ = 0;
  uint64_t left = copiedClusters();
  if (left == 0) return {};
  return eachFree(next_, cancel, [&](ClusterRun run) {
    const uint64_t taken = surelyIn(run, left);
    inside_ += taken;
    left -= taken;
    return Outcome{};
  });
}

// What new clusters lack: those of `area`, and what copies may take of free ones before it.
Outcome Allocator::addPlaces(const HostFiles& files, ClusterRun area, const CancelFlag& cancel,
                             Lacking* lacking) const {
  HostLookup host(files.fd, files.method);
  Lacking found;
  const auto add = [&](ClusterRun run) {
    const Range range{bytes(run.first), bytes(run.count)};
    return Outcome::of(host.addLacking(range, range.end(), cancel, &found));
  };
  Outcome outcome;
  // A reserve is for all that is free in the file, and counts it.
  const bool inside = copiedClusters() > 0 && needed_.reserve == 0;
  uint64_t left = inside ? copiedClusters() + needed_.tables + needed_.refcounts : 0;
  if (inside)
    outcome = eachFree(next_, cancel, [&](ClusterRun run) {
      const ClusterRun part{run.first, std::min(left, run.count)};
      left -= surelyIn(run, left);
      return part.count == 0 ? Outcome{} : add(part);
    });
  if (outcome.ok()) outcome = add(area);
  lacking->holes += std::min(found.holes, bytes(area.count + inside_));
  lacking->shared += found.shared;
  return outcome;
}

// Level metadata gives blocks to what is copied, and to tables.
Outcome Allocator::measureCopies(const HostFiles& files, const CancelFlag& cancel,
                                 HostNeeds* needs) const {
  const uint64_t copied = bytes(image_.geometry.clustersFor(request_.copied));
  if (image_.geometry.externalData) {
    Outcome outcome = measureData(files, cancel, needs);
    needs->data = std::min(needs->data, copied);
    needs->sharedData = 0;
    return outcome;
  }
  const uint64_t tables = needs->file;
  const ClusterRun area{next_, copiedClusters() + needed_.tables + needed_.refcounts - inside_};
  Lacking lacking;
  Outcome outcome = addPlaces(files, area, cancel, &lacking);
  // Some of them are parts of clusters that are mapped already.
  const uint64_t parts = copied - bytes(copiedClusters());
  needs->file = std::min(lacking.holes + parts + tables, copied + tables);
  return outcome;
}

}  // namespace thicken::qcow2
