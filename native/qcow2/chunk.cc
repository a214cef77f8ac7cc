#include "chunk.h"

#include <algorithm>

namespace thicken::qcow2 {
namespace {

constexpr uint64_t kTableBytes = 16u << 20;

}  // namespace

Outcome Chunk::load(Io& io, ClusterRun clusters, Refcounts* counts) {
  const Geometry& geometry = image_.geometry;
  const uint64_t entries = geometry.tableEntries();
  const uint64_t most = std::max<uint64_t>(1, kTableBytes >> geometry.clusterBits);
  const uint64_t furthest = (clusters.first / entries + most) * entries;
  const uint64_t end = std::min(clusters.end(), furthest);
  clusters_ = ClusterRun{clusters.first, end - clusters.first};
  for (uint64_t at = clusters.first; at < end;) {
    ChunkTable table;
    table.l1Index = at / entries;
    table.firstEntry = at % entries;
    table.endEntry = std::min(entries, table.firstEntry + (end - at));
    table.oldCluster = (image_.l1[table.l1Index] & kOffsetMask) >> geometry.clusterBits;
    at += table.endEntry - table.firstEntry;
    tables_.push_back(table);
  }
  Outcome outcome = loadTables(io, counts);
  for (size_t i = 0; outcome.ok() && i < tables_.size(); i++) outcome = examine(i);
  return outcome;
}

Outcome Chunk::loadTables(Io& io, Refcounts* counts) {
  const uint64_t size = image_.geometry.clusterSize();
  bytes_ = ZeroedPages(tables_.size() * size);
  if (bytes_.data() == nullptr) return Outcome::of(Status{ENOMEM, "mmap"});
  for (size_t i = 0; i < tables_.size();) {
    ChunkTable& first = tables_[i];
    size_t next = i + 1;
    if (first.oldCluster == 0) {
      i = next;
      continue;
    }
    while (next < tables_.size() && tables_[next].oldCluster == first.oldCluster + (next - i))
      next++;
    const Range bytes{first.oldCluster * size, (next - i) * size};
    Outcome outcome = Outcome::of(readPadded(io, bytes, bytesOf(i)));
    for (; outcome.ok() && i < next; i++)
      outcome = isOwned(image_, image_.l1[tables_[i].l1Index], counts, &tables_[i].owned);
    if (!outcome.ok()) return outcome;
  }
  return {};
}

bool Chunk::changesInPlace() const {
  return std::any_of(tables_.begin(), tables_.end(),
                     [](const ChunkTable& table) { return table.changed && table.owned; });
}

// Entries for which the rules say the same, too.
EntryRun Chunk::runAt(size_t index, uint64_t from, uint64_t end) {
  const uint64_t start = tables_[index].l1Index * image_.geometry.tableEntries();
  const uint64_t stop = rules_.alikeUntil(start + from, start + end) - start;
  return loadRun(image_, bytesOf(index), start, from, stop);
}

Outcome Chunk::examine(size_t index) {
  const Geometry& geometry = image_.geometry;
  ChunkTable& table = tables_[index];
  const uint64_t start = table.l1Index * geometry.tableEntries();
  for (uint64_t i = table.firstEntry; i < table.endEntry;) {
    const uint64_t guest = start + i;
    const EntryRun run = runAt(index, i, table.endEntry);
    i += run.count;
    if (const char* fault = entryFault(image_, run.first, guest))
      return Outcome::refused(Code::corrupt, fault,
                              Range{guest << geometry.clusterBits, geometry.clusterSize()});
    const Decision decision = rules_.decide(run.first, guest);
    if (decision.action == Action::populate)
      return Outcome::refused(Code::needsPopulate, "content comes from the backing file",
                              Range{guest << geometry.clusterBits, geometry.clusterSize()});
    noteRun(run, guest, decision.action);
    if (decision.action == Action::keep) continue;
    table.changed = true;
    table.dirtyFirst = std::min(table.dirtyFirst, i - run.count);
    table.dirtyEnd = i;
  }
  if (table.changed) hasChanges_ = true;
  if (table.changed && !table.owned) tablesNeeded_++;
  return {};
}

// A data file may hold old bytes wherever nothing is mapped to it.
bool Chunk::isFilled(Action action) const {
  return action == Action::fill ||
         (action == Action::map && image_.geometry.externalData && rules_.plain());
}

void Chunk::noteRun(const EntryRun& run, uint64_t guestCluster, Action action) {
  if (request_.level == Level::full || isFilled(action))
    for (uint64_t k = 0; k < run.count; k++) noteZeros(run.at(k), guestCluster + k);
  if (action == Action::map) {
    mappedClusters_ += run.count;
    return;
  }
  if (request_.level == Level::metadata || run.first.isCompressed() || image_.geometry.externalData)
    return;
  const uint64_t host = run.first.offset() >> image_.geometry.clusterBits;
  if (!mapped_.empty() && mapped_.back().end() == host)
    mapped_.back().count += run.count;
  else
    mapped_.push_back(ClusterRun{host, run.count});
}

// A cluster that a snapshot shares may be data there, whatever its state is here.
void Chunk::noteZeros(Entry entry, uint64_t guestCluster) {
  const Geometry& geometry = image_.geometry;
  if (entry.isCompressed()) return;
  const bool host = entry.hasHost(geometry.externalData);
  const uint64_t place =
      geometry.externalData ? guestCluster << geometry.clusterBits : entry.offset();
  if (!geometry.externalData && (!host || !entry.isCopied())) return;
  if (!geometry.extended) {
    if (!host || entry.isZero()) addZeroRange(Range{place, geometry.clusterSize()});
    return;
  }
  const uint64_t size = geometry.subclusterSize();
  for (uint32_t i = 0; i < kSubclusters; i++)
    if ((entry.allocated() >> i & 1) == 0) addZeroRange(Range{place + i * size, size});
}

void Chunk::addZeroRange(Range range) {
  if (!zeroRanges_.empty() && zeroRanges_.back().end() == range.offset)
    zeroRanges_.back().length += range.length;
  else
    zeroRanges_.push_back(range);
}

// Ciphertext of zeros is not zeros: such a cluster keeps the flag, as one of unknown content does.
Entry Chunk::mapped(Entry entry, uint64_t hostCluster, bool zero) const {
  const Geometry& geometry = image_.geometry;
  const bool plain = zero && image_.header.cryptMethod == 0;
  entry.word = kCopied | hostCluster << geometry.clusterBits;
  if (geometry.extended)
    entry.bitmap = plain ? kAllAllocated : kAllZero;
  else if (!plain && geometry.version >= 3)
    entry.word |= kZero;
  return entry;
}

// Subclusters that have no state yet read as zeros from now on.
Entry Chunk::zeroed(Entry entry) {
  entry.bitmap |= (~entry.bitmap & kAllAllocated & ~(entry.bitmap >> 32)) << 32;
  return entry;
}

Entry Chunk::filled(Entry entry) const {
  entry.word &= ~kZero;
  if (image_.geometry.extended) entry.bitmap = kAllAllocated;
  return entry;
}

void Chunk::assign(const std::vector<Supply>& supply) {
  Dealer dealer{supply};
  for (size_t t = 0; t < tables_.size(); t++) {
    const ChunkTable& table = tables_[t];
    const uint64_t start = table.l1Index * image_.geometry.tableEntries();
    for (uint64_t i = table.dirtyFirst; table.changed && i < table.dirtyEnd;) {
      const EntryRun run = runAt(t, i, table.dirtyEnd);
      const Action action = rules_.decide(run.first, start + i).action;
      for (uint64_t k = 0; action != Action::keep && k < run.count; k++)
        storeEntry(image_.geometry, bytesOf(t), i + k,
                   changed(run.at(k), start + i + k, action, &dealer));
      i += run.count;
    }
  }
}

Entry Chunk::changed(Entry entry, uint64_t guestCluster, Action action, Dealer* dealer) {
  if (action == Action::zeroBits) return zeroed(entry);
  if (action == Action::fill) return filled(entry);
  if (image_.geometry.externalData) return mapped(entry, guestCluster, rules_.plain());
  if (entry.offset() != 0) replaced_.push_back(entry.offset() >> image_.geometry.clusterBits);
  const Supply dealt = dealer->next();
  return mapped(entry, dealt.clusters.first, dealt.zero || rules_.plain());
}

std::vector<ClusterRun> Chunk::takeMapped() {
  std::sort(mapped_.begin(), mapped_.end(),
            [](const ClusterRun& a, const ClusterRun& b) { return a.first < b.first; });
  std::vector<ClusterRun> merged;
  for (const ClusterRun& run : mapped_) {
    if (!merged.empty() && run.first <= merged.back().end())
      merged.back().count = std::max(merged.back().end(), run.end()) - merged.back().first;
    else
      merged.push_back(run);
  }
  mapped_.clear();
  mapped_.shrink_to_fit();
  return merged;
}

}  // namespace thicken::qcow2
