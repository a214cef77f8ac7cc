#pragma once

#include <cstdint>
#include <vector>

#include "../pages.h"
#include "demand.h"
#include "layout.h"

namespace thicken::qcow2 {

/// One L2 table of a chunk.
struct ChunkTable {
  uint64_t l1Index = 0;
  uint64_t firstEntry = 0;  ///< the entries that the chunk covers
  uint64_t endEntry = 0;
  uint64_t oldCluster = 0;  ///< 0 where L1 has none
  uint64_t place = 0;       ///< cluster it is written to
  bool owned = false;       ///< changed in place
  bool changed = false;
  uint64_t dirtyFirst = ~0ull;  ///< entries that differ from the disk
  uint64_t dirtyEnd = 0;
};

/// Host clusters for guest data, in guest order.
struct Supply {
  ClusterRun clusters;
  bool zero = false;  ///< reads as zeros for certain
};

/// Deals a supply out, one cluster at a time.
class Dealer {
 public:
  explicit Dealer(const std::vector<Supply>& supply) : supply_(supply) {}

  Supply next() {
    const Supply& from = supply_[at_];
    const Supply dealt{ClusterRun{from.clusters.first + used_, 1}, from.zero};
    if (++used_ == from.clusters.count) {
      at_++;
      used_ = 0;
    }
    return dealt;
  }

 private:
  const std::vector<Supply>& supply_;
  size_t at_ = 0;
  uint64_t used_ = 0;
};

/// A bounded piece of the guest range with its L2 tables in memory: first read, then changed there.
class Chunk {
 public:
  Chunk(const Image& image, const Request& request, const Rules& rules)
      : image_(image), request_(request), rules_(rules) {}

  /// Reads the tables for `clusters`, or for the first of them if they are too many, and finds out
  /// what they lack. Reads only.
  Outcome load(Io& io, ClusterRun clusters, Refcounts* counts);

  ClusterRun clusters() const { return clusters_; }
  /// Guest clusters that get a host cluster, and how many of them must be found in the container.
  uint64_t mappedClusters() const { return mappedClusters_; }
  uint64_t dataNeeded() const { return image_.geometry.externalData ? 0 : mappedClusters_; }
  uint64_t tablesNeeded() const { return tablesNeeded_; }
  bool hasChanges() const { return hasChanges_; }
  /// Whether a table changes that something refers to already.
  bool changesInPlace() const;

  /// Enters new clusters into the tables. `supply` holds dataNeeded() clusters, which read as zeros
  /// by now if that is what the rules want.
  void assign(const std::vector<Supply>& supply);
  /// Clusters that the tables referred to before, once for each entry that did.
  const std::vector<uint64_t>& replaced() const { return replaced_; }

  std::vector<ChunkTable>& tables() { return tables_; }
  const std::vector<ChunkTable>& tables() const { return tables_; }
  uint8_t* bytesOf(size_t table) {
    return static_cast<uint8_t*>(bytes_.data()) + table * image_.geometry.clusterSize();
  }

  /// Host clusters that the range is mapped to already, merged and ascending.
  std::vector<ClusterRun> takeMapped();
  /// Bytes of the container (of the data file, if that is external) that hold no data that anybody
  /// can read, and are to be written with zeros.
  const std::vector<Range>& zeroRanges() const { return zeroRanges_; }
  void addZeroRange(Range range);

 private:
  Outcome loadTables(Io& io, Refcounts* counts);
  Outcome examine(size_t table);
  void noteRun(const EntryRun& run, uint64_t guestCluster, Action action);
  void noteZeros(Entry entry, uint64_t guestCluster);
  bool isFilled(Action action) const;
  EntryRun runAt(size_t table, uint64_t from, uint64_t end);
  Entry changed(Entry entry, uint64_t guestCluster, Action action, Dealer* dealer);
  Entry mapped(Entry entry, uint64_t hostCluster, bool zero) const;
  static Entry zeroed(Entry entry);
  Entry filled(Entry entry) const;

  const Image& image_;
  const Request& request_;
  const Rules& rules_;
  ClusterRun clusters_;
  std::vector<ChunkTable> tables_;
  ZeroedPages bytes_;
  std::vector<ClusterRun> mapped_;
  std::vector<Range> zeroRanges_;
  std::vector<uint64_t> replaced_;
  uint64_t mappedClusters_ = 0;
  uint64_t tablesNeeded_ = 0;
  bool hasChanges_ = false;
};

}  // namespace thicken::qcow2
