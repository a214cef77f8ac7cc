#include <algorithm>

#include "allocate.h"

namespace thicken::qcow2 {
namespace {

constexpr size_t kExtentsAtOnce = 4096;

// Those of JoinedState::data and what follows it have a state of the host's too.
void addJoined(uint8_t state, uint64_t bytes, Lacking* lacking) {
  constexpr auto kFirst = static_cast<uint8_t>(JoinedState::data);
  if (state >= kFirst) lacking->add(static_cast<HostState>((state - kFirst) % 5), bytes);
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

// Clusters of the request that are mapped already.
Outcome Allocator::measureMapped(const HostFiles& files, const CancelFlag& cancel,
                                 HostNeeds* needs) const {
  Lacking lacking;
  const uint64_t end = image_.geometry.clippedEnd(request_.range.offset, request_.range.length);
  for (uint64_t at = request_.range.offset; at < end && !cancel.isSet();) {
    JoinedPage page;
    Outcome outcome = readJoined(image_, files, Range{at, end - at}, kExtentsAtOnce, cancel, &page);
    if (!outcome.ok()) return outcome;
    for (size_t i = 0; i < page.size(); i++)
      addJoined(page.state[i], static_cast<uint64_t>(page.length[i]), &lacking);
    at = page.next;
  }
  needs->file += lacking.holes;
  needs->sharedFile += lacking.shared;
  return {};
}

Outcome Allocator::measureData(const HostFiles& files, const CancelFlag& cancel,
                               HostNeeds* needs) const {
  const uint64_t end = image_.geometry.clippedEnd(request_.range.offset, request_.range.length);
  const uint64_t start = std::min(request_.range.offset, end);
  HostLookup data(files.dataFd, files.dataMethod);
  Lacking lacking;
  Status status = data.addLacking(Range{start, end - start}, end, cancel, &lacking);
  needs->data += lacking.holes;
  needs->heldData += lacking.held;
  needs->sharedData += lacking.shared;
  return Outcome::of(status);
}

Outcome Allocator::measureNew(const HostFiles& files, const CancelFlag& cancel,
                              HostNeeds* needs) const {
  HostLookup host(files.fd, files.method);
  Lacking lacking;
  Outcome outcome;
  uint64_t reused = needed_.reused;
  for (const ClusterRun& leak : survey_.leaks) {
    if (!outcome.ok() || reused == 0) break;
    const ClusterRun run{leak.first, std::min(reused, leak.count)};
    const Range range{bytes(run.first), bytes(run.count)};
    outcome = Outcome::of(host.addLacking(range, range.end(), cancel, &lacking));
    reused -= run.count;
  }
  if (outcome.ok()) outcome = addPlaces(files, needed_.area, cancel, &lacking);
  needs->file += lacking.holes;
  needs->sharedFile += lacking.shared;
  return outcome;
}

Outcome Allocator::measureReserve(const HostFiles& files, const CancelFlag& cancel,
                                  HostNeeds* needs) const {
  const Geometry& geometry = image_.geometry;
  HostLookup host(files.fd, files.method);
  const auto add = [&](uint64_t first, uint64_t end, Lacking* lacking) {
    if (first >= end) return Outcome{};
    const Range range{bytes(first), bytes(end - first)};
    return Outcome::of(host.addLacking(range, range.end(), cancel, lacking));
  };
  const uint64_t behind = needed_.blocks + needed_.reserve;
  const uint64_t now = geometry.clustersFor(image_.fileSize) + behind;
  const uint64_t then = geometry.clustersFor(needed_.fileEnd) + behind;
  Lacking unreserved;
  Lacking later;
  Outcome outcome = eachFree(then, cancel, [&](ClusterRun run) {
    Outcome part = add(run.first, std::min(run.end(), now), &unreserved);
    // What the request itself takes is counted already.
    if (part.ok()) part = add(run.first, std::min(run.end(), needed_.area.first), &later);
    if (part.ok()) part = add(std::max(run.first, needed_.area.end()), run.end(), &later);
    return part;
  });
  // Leaks that the request has no use for are free by then.
  uint64_t reused = needed_.reused;
  for (const ClusterRun& leak : survey_.leaks) {
    if (!outcome.ok() || cancel.isSet()) break;
    const uint64_t used = std::min(reused, leak.count);
    reused -= used;
    outcome = add(leak.first + used, std::min(leak.end(), now), &unreserved);
    if (outcome.ok()) outcome = add(leak.first + used, std::min(leak.end(), then), &later);
  }
  // Blocks are missing, whatever lies there.
  needs->unreserved += std::max(unreserved.holes, bytes(needed_.blocks));
  needs->later += later.holes;
  return outcome;
}

Outcome Allocator::measureHost(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs) {
  *needs = HostNeeds{};
  lacking_.clear();
  if (request_.level == Level::metadata) {
    needs->file = bytes(needed_.tables + needed_.refcounts);
    return request_.copied == 0 ? Outcome{} : measureCopies(files, cancel, needs);
  }
  Outcome outcome = image_.geometry.externalData ? measureData(files, cancel, needs)
                                                 : measureMapped(files, cancel, needs);
  if (outcome.ok()) outcome = measureNew(files, cancel, needs);
  if (outcome.ok()) outcome = measureTables(files, cancel, needs);
  if (outcome.ok() && needed_.reserve > 0) outcome = measureReserve(files, cancel, needs);
  needs->file += needs->later;
  return outcome;
}

}  // namespace thicken::qcow2
