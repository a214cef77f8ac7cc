#include "demand.h"

#include <algorithm>

#include "tables.h"

namespace thicken::qcow2 {
namespace {

ClusterRun clustersOf(const Geometry& geometry, Range range) {
  const uint64_t end = geometry.clippedEnd(range.offset, range.length);
  const uint64_t first = std::min(range.offset, end) >> geometry.clusterBits;
  if (range.length == 0 || range.offset >= end) return ClusterRun{first, 0};
  return ClusterRun{first, geometry.clustersFor(end) - first};
}

void note(const Geometry& geometry, Decision decision, uint64_t cluster, uint64_t count,
          Demand* demand) {
  if (decision.moves) demand->moving += count;
  if (decision.mixed) demand->mixed += count;
  if (decision.action == Action::map) demand->data += count;
  if (decision.action == Action::fill) demand->fills += count;
  if (decision.action == Action::zeroBits || decision.action == Action::fill)
    demand->changes += count;
  if (decision.action == Action::populate && !demand->backed) {
    demand->backed = true;
    demand->firstBacked = cluster << geometry.clusterBits;
  }
}

}  // namespace

Rules::Rules(const Image& image, const Request& request)
    : geometry_(image.geometry),
      plain_(request.level != Level::metadata && image.header.cryptMethod == 0),
      clusters_(clustersOf(image.geometry, request.range)) {
  if (!image.header.hasBacking) return;
  backedEnd_ = std::min(request.backingEnd, geometry_.virtualSize);
}

uint64_t Rules::alikeUntil(uint64_t guestCluster, uint64_t end) const {
  const uint64_t whole = backedEnd_ >> geometry_.clusterBits;
  if (guestCluster < whole) return std::min(end, whole);
  return guestCluster < geometry_.clustersFor(backedEnd_) ? guestCluster + 1 : end;
}

uint32_t Rules::backedSubclusters(uint64_t guestCluster) const {
  const uint64_t start = guestCluster << geometry_.clusterBits;
  if (start >= backedEnd_) return 0;
  const uint64_t size = geometry_.subclusterSize();
  const uint64_t count = (backedEnd_ - start + size - 1) / size;
  return count >= kSubclusters ? 0xffffffff : (1u << count) - 1;
}

Decision Rules::decide(Entry entry, uint64_t guestCluster) const {
  if (entry.isCompressed()) return Decision{Action::keep, true};
  const bool host = entry.hasHost(geometry_.externalData);
  if (geometry_.extended) return decideSubclusters(entry, host, backedSubclusters(guestCluster));
  const bool backed = guestCluster << geometry_.clusterBits < backedEnd_;
  const bool moves = host && !geometry_.externalData && !entry.isCopied();
  if (host && entry.isZero() && plain_) return Decision{moves ? Action::map : Action::fill, false};
  if (host) return Decision{Action::keep, moves};
  if (entry.isZero()) return Decision{Action::map, false};
  return Decision{backed ? Action::populate : Action::map, false};
}

Decision Rules::decideSubclusters(Entry entry, bool host, uint32_t backed) const {
  const uint32_t own = entry.allocated() | entry.zeroed();
  const bool complete = own == 0xffffffff;
  const bool moves = host && !geometry_.externalData && !entry.isCopied();
  if ((~own & backed) != 0) return Decision{Action::populate, moves};
  // What a snapshot has too, and holds no data, needs no copy.
  if (!host || (plain_ && moves && entry.allocated() == 0)) return Decision{Action::map, false};
  const bool full = entry.allocated() == 0xffffffff;
  if (plain_ && !moves && !full) return Decision{Action::fill, false};
  return Decision{complete ? Action::keep : Action::zeroBits, moves, plain_ && !full};
}

Outcome isOwned(const Image& image, uint64_t l1Entry, Refcounts* counts, bool* owned) {
  *owned = false;
  if ((l1Entry & kCopied) == 0) return {};
  uint64_t count = 0;
  Outcome outcome = counts->get((l1Entry & kOffsetMask) >> image.geometry.clusterBits, &count);
  *owned = count == 1;
  return outcome;
}

Outcome measureDemand(Io& io, const Image& image, const Rules& rules, Refcounts* counts,
                      const CancelFlag& cancel, Demand* demand) {
  *demand = Demand{};
  const Geometry& geometry = image.geometry;
  const uint64_t entries = geometry.tableEntries();
  TableReader reader(io, image, image.l1);
  for (uint64_t at = rules.clusters().first; at < rules.clusters().end();) {
    if (cancel.isSet()) {
      demand->cancelled = true;
      return {};
    }
    const uint64_t index = at / entries;
    const uint64_t start = index * entries;
    const uint64_t end = std::min(rules.clusters().end(), start + entries);
    const uint8_t* table = nullptr;
    Outcome outcome = reader.get(index, &table);
    if (!outcome.ok()) return outcome;
    const Demand before = *demand;
    for (uint64_t cluster = at; cluster < end;) {
      const uint64_t stop = rules.alikeUntil(cluster, end);
      EntryRun run{Entry{}, stop - cluster};
      if (table != nullptr) run = loadRun(image, table, start, cluster - start, stop - start);
      note(geometry, rules.decide(run.first, cluster), cluster, run.count, demand);
      cluster += run.count;
    }
    const bool changes = demand->data != before.data || demand->changes != before.changes;
    bool owned = table != nullptr;
    if (owned) outcome = isOwned(image, image.l1[index], counts, &owned);
    if (!outcome.ok()) return outcome;
    if (changes && !owned) demand->tables++;
    if (!changes && !owned && table != nullptr) demand->moving++;
    counts->trim();
    at = end;
  }
  return {};
}

}  // namespace thicken::qcow2
