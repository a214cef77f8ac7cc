#include "references.h"

#include <algorithm>

#include "tables.h"

namespace thicken::qcow2 {
namespace {

ClusterRun clustersOf(const Geometry& geometry, Range bytes) {
  const uint64_t first = bytes.offset >> geometry.clusterBits;
  return ClusterRun{first, geometry.clustersFor(bytes.end()) - first};
}

Outcome addExclusive(const Image& image, Range bytes, ReferenceSink* sink) {
  if (bytes.length == 0) return {};
  return sink->add(Reference{clustersOf(image.geometry, bytes), Use::exclusive});
}

Outcome addFixedTables(const Image& image, ReferenceSink* sink) {
  const Header& header = image.header;
  const uint64_t size = image.geometry.clusterSize();
  Outcome outcome = addExclusive(image, Range{0, size}, sink);
  const Range tables[] = {
      {header.l1Offset, uint64_t{header.l1Entries} * 8},
      {header.refcountTableOffset, header.refcountTableClusters * size},
      image.snapshotTable,
      header.luks,
  };
  for (const Range& table : tables)
    if (outcome.ok()) outcome = addExclusive(image, table, sink);
  for (const Snapshot& snapshot : image.snapshots)
    if (outcome.ok())
      outcome =
          addExclusive(image, Range{snapshot.l1Offset, uint64_t{snapshot.l1Entries} * 8}, sink);
  for (const uint64_t block : image.refcountTable)
    if (outcome.ok() && block != 0) outcome = addExclusive(image, Range{block, size}, sink);
  return outcome;
}

// What is below one L1 table. Neighbouring clusters go on together.
class L1Walk {
 public:
  L1Walk(Io& io, const Image& image, const std::vector<uint64_t>& l1, bool active,
         ReferenceSink* sink)
      : image_(image), l1_(l1), active_(active), sink_(sink), tables_(io, image, l1) {}

  Outcome run(const CancelFlag& cancel, bool* cancelled) {
    Outcome outcome;
    for (uint64_t index = 0; outcome.ok() && index < l1_.size(); index++) {
      if ((l1_[index] & kOffsetMask) == 0) continue;
      if (cancel.isSet()) {
        *cancelled = true;
        return {};
      }
      outcome = addTable(index);
    }
    return outcome.ok() ? flush() : outcome;
  }

 private:
  Outcome addTable(uint64_t index) {
    const Geometry& geometry = image_.geometry;
    const uint64_t cluster = (l1_[index] & kOffsetMask) >> geometry.clusterBits;
    Outcome outcome = add(ClusterRun{cluster, 1}, Use::table, (l1_[index] & kCopied) != 0);
    const uint8_t* table = nullptr;
    if (outcome.ok()) outcome = tables_.get(index, &table);
    const uint64_t entries = geometry.tableEntries();
    const uint64_t start = index * entries;
    for (uint64_t i = 0; outcome.ok() && i < entries;) {
      const EntryRun run = loadRun(image_, table, start, i, entries);
      if (const char* fault = entryFault(image_, run.first, start + i))
        return Outcome::refused(Code::corrupt, std::string(fault) + "; `qemu-img check` tells more",
                                Range{(l1_[index] & kOffsetMask) + i * geometry.entrySize(), 8});
      outcome = addEntries(run);
      i += run.count;
    }
    return outcome;
  }

  Outcome addEntries(const EntryRun& run) {
    const Geometry& geometry = image_.geometry;
    const Entry entry = run.first;
    if (entry.isCompressed())
      return add(clustersOf(geometry, compressedRange(geometry, entry)), Use::guest, false, true);
    if (geometry.externalData || entry.offset() == 0) return {};
    const ClusterRun clusters{entry.offset() >> geometry.clusterBits, run.count};
    return add(clusters, Use::guest, entry.isCopied());
  }

  Outcome add(ClusterRun clusters, Use use, bool copied, bool packed = false) {
    copied = copied && active_;
    ClusterRun& run = pending_.clusters;
    const bool alike =
        use == pending_.use && copied == pending_.copied && packed == pending_.packed;
    if (alike && clusters.first == run.end()) {
      run.count += clusters.count;
      return {};
    }
    Outcome outcome = flush();
    pending_ = Reference{clusters, use, active_, copied, packed};
    return outcome;
  }

  Outcome flush() {
    const Reference reference = pending_;
    pending_ = Reference{};
    return reference.clusters.count == 0 ? Outcome{} : sink_->add(reference);
  }

  const Image& image_;
  const std::vector<uint64_t>& l1_;
  bool active_;
  ReferenceSink* sink_;
  TableReader tables_;
  Reference pending_;
};

Outcome checkSnapshotL1(const Image& image, const std::vector<uint64_t>& l1, uint64_t offset) {
  for (size_t i = 0; i < l1.size(); i++) {
    const uint64_t table = l1[i] & kOffsetMask;
    const bool valid = (l1[i] & kL1Reserved) == 0 && image.geometry.isAligned(table) &&
                       image.contains(Range{table, image.geometry.clusterSize()});
    if (!valid)
      return Outcome::refused(Code::corrupt, "an invalid entry in a snapshot's L1 table",
                              Range{offset + i * 8, 8});
  }
  return {};
}

}  // namespace

Outcome walkReferences(Io& io, const Image& image, const CancelFlag& cancel, ReferenceSink* sink,
                       bool* cancelled) {
  Outcome outcome = addFixedTables(image, sink);
  if (outcome.ok()) outcome = walkBitmaps(io, image, sink);
  if (outcome.ok()) outcome = L1Walk(io, image, image.l1, true, sink).run(cancel, cancelled);
  for (const Snapshot& snapshot : image.snapshots) {
    if (!outcome.ok() || *cancelled) break;
    std::vector<uint64_t> l1;
    outcome = readWords(io, snapshot.l1Offset, snapshot.l1Entries, &l1);
    if (outcome.ok()) outcome = checkSnapshotL1(image, l1, snapshot.l1Offset);
    if (outcome.ok()) outcome = L1Walk(io, image, l1, false, sink).run(cancel, cancelled);
  }
  return outcome;
}

}  // namespace thicken::qcow2
