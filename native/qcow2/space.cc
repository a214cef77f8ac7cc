#include <algorithm>

#include "allocate.h"

namespace thicken::qcow2 {
namespace {

constexpr size_t kExtentsAtOnce = 4096;

// Those of JoinedState::data and what follows it have a state of the host's too.
bool isHole(uint8_t state) {
  constexpr auto kFirst = static_cast<uint8_t>(JoinedState::data);
  return state >= kFirst && static_cast<HostState>((state - kFirst) % 5) == HostState::hole;
}

}  // namespace

// Runs of clusters before `end` that have no count, in ascending order.
Outcome Allocator::eachFree(uint64_t end, const CancelFlag& cancel,
                            const std::function<Outcome(ClusterRun)>& use) const {
  const Geometry& geometry = image_.geometry;
  const uint64_t entries = geometry.blockEntries();
  std::vector<uint8_t> block(geometry.clusterSize());
  ClusterRun run;
  Outcome outcome;
  for (uint64_t first = 0; outcome.ok() && first < end && !cancel.isSet(); first += entries) {
    const uint64_t count = std::min(entries, end - first);
    if (!counts_.hasBlock(first / entries)) {
      if (run.count == 0) run.first = first;
      run.count += count;
      continue;
    }
    const Range place{image_.refcountTable[first / entries], block.size()};
    outcome = Outcome::of(readPadded(file_, place, block.data()));
    for (uint64_t i = 0; outcome.ok() && i < count; i++) {
      if (getCount(block.data(), geometry.refcountOrder, i) == 0) {
        if (run.count++ == 0) run.first = first + i;
      } else if (run.count > 0) {
        outcome = use(run);
        run.count = 0;
      }
    }
  }
  return outcome.ok() && run.count > 0 && !cancel.isSet() ? use(run) : outcome;
}

// Clusters of the request that are mapped to holes of the host.
Outcome Allocator::measureMapped(const HostFiles& files, const CancelFlag& cancel,
                                 uint64_t* holes) const {
  const uint64_t end = image_.geometry.clippedEnd(request_.range.offset, request_.range.length);
  for (uint64_t at = request_.range.offset; at < end && !cancel.isSet();) {
    JoinedPage page;
    Outcome outcome = readJoined(image_, files, Range{at, end - at}, kExtentsAtOnce, cancel, &page);
    if (!outcome.ok()) return outcome;
    for (size_t i = 0; i < page.size(); i++)
      if (isHole(page.state[i])) *holes += static_cast<uint64_t>(page.length[i]);
    at = page.next;
  }
  return {};
}

Outcome Allocator::measureHost(const HostFiles& files, const CancelFlag& cancel,
                               HostNeeds* needs) const {
  *needs = HostNeeds{};
  const Geometry& geometry = image_.geometry;
  if (request_.level == Level::metadata) {
    needs->file = bytes(needed_.tables + needed_.refcounts);
    return {};
  }
  if (geometry.externalData) {
    const uint64_t end = geometry.clippedEnd(request_.range.offset, request_.range.length);
    const uint64_t start = std::min(request_.range.offset, end);
    HostLookup data(files.dataFd, files.dataMethod);
    Status status = data.addHoles(Range{start, end - start}, end, cancel, &needs->data);
    if (!status.ok()) return Outcome::of(status);
  }
  HostLookup host(files.fd, files.method);
  const auto add = [&](ClusterRun run, uint64_t* sum) {
    return Outcome::of(
        host.addHoles(Range{bytes(run.first), bytes(run.count)}, bytes(run.end()), cancel, sum));
  };
  Outcome outcome;
  if (!geometry.externalData) outcome = measureMapped(files, cancel, &needs->file);
  uint64_t reused = needed_.reused;
  for (const ClusterRun& leak : survey_.leaks) {
    if (!outcome.ok() || reused == 0) break;
    const ClusterRun run{leak.first, std::min(reused, leak.count)};
    outcome = add(run, &needs->file);
    reused -= run.count;
  }
  if (outcome.ok()) outcome = add(needed_.area, &needs->file);
  if (needed_.reserve == 0) return outcome;
  const uint64_t now = geometry.clustersFor(image_.fileSize) + needed_.reserve;
  const uint64_t then = geometry.clustersFor(needed_.fileEnd) + needed_.reserve;
  const auto addFree = [&](ClusterRun run) {
    Outcome part;
    if (run.first < now)
      part = add(ClusterRun{run.first, std::min(run.count, now - run.first)}, &needs->unreserved);
    // What the request itself takes is counted above.
    const uint64_t before = std::min(run.end(), std::max(run.first, needed_.area.first));
    if (part.ok()) part = add(ClusterRun{run.first, before - run.first}, &needs->file);
    const uint64_t after = std::max(run.first, needed_.area.end());
    if (part.ok() && after < run.end())
      part = add(ClusterRun{after, run.end() - after}, &needs->file);
    return part;
  };
  return outcome.ok() ? eachFree(then, cancel, addFree) : outcome;
}

}  // namespace thicken::qcow2
