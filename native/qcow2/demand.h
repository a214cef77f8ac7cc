#pragma once

#include <cstdint>

#include "../cancel.h"
#include "entry.h"
#include "refcounts.h"

namespace thicken::qcow2 {

/// How far to go, in QEMU's words. The numbers cross from JavaScript.
enum class Level : uint8_t { metadata = 0, falloc = 1, full = 2 };

struct Request {
  Range range;  ///< guest bytes; widened to clusters, clipped to the virtual size
  Level level = Level::falloc;
  /// Guest offset from which on nothing comes from the backing file. The default knows nothing of
  /// it, and refuses every unallocated cluster of an image that has one.
  uint64_t backingEnd = ~0ull;
  /// The caller writes zeros to all that has no blocks afterwards.
  bool zerosFollow = false;
  /// Bytes, in whole clusters, that a QEMU copies into the image first, where it puts them itself.
  uint64_t copied = 0;
};

enum class Action : uint8_t {
  keep,      ///< is mapped
  map,       ///< gets a host cluster
  zeroBits,  ///< its unallocated subclusters get their zero bit
  fill,      ///< its storage is made zeros, and the flag or bits go that say so
  populate,  ///< its content comes from the backing file
};

struct Decision {
  Action action = Action::keep;
  bool moves = false;  ///< a later write needs another cluster for it: compressed, or shared
  bool mixed = false;  ///< subclusters that are zeros in a shared cluster, beside such as have data
};

/// What is to be done about each entry.
class Rules {
 public:
  Rules(const Image& image, const Request& request);

  Decision decide(Entry entry, uint64_t guestCluster) const;
  /// Up to which cluster, `end` at most, entries that say the same are decided alike.
  uint64_t alikeUntil(uint64_t guestCluster, uint64_t end) const;

  /// The guest clusters of the request.
  ClusterRun clusters() const { return clusters_; }

  /// Whether clusters with storage must not be marked as zeros: for a write to a part of one, QEMU
  /// has the host zero the rest (FALLOC_FL_ZERO_RANGE), which takes new blocks where that is done
  /// by giving the old ones back (xfs, btrfs), and on ext4 for its records. Ciphertext of zeros
  /// isn't zeros, and QEMU writes that out itself.
  bool plain() const { return plain_; }

 private:
  Decision decideSubclusters(Entry entry, bool host, uint32_t backed) const;
  /// Those of a cluster that lie over the backing file, up to its end or the disk's: QEMU leaves
  /// the ones behind the disk's end as they are.
  uint32_t backedSubclusters(uint64_t guestCluster) const;

  Geometry geometry_;
  bool plain_ = false;
  uint64_t backedEnd_ = 0;  // bytes
  ClusterRun clusters_;
};

/// What a range lacks, in clusters.
struct Demand {
  uint64_t data = 0;         ///< guest clusters without a host cluster
  uint64_t tables = 0;       ///< L2 tables that are missing, or shared and to be changed
  uint64_t changes = 0;      ///< entries that keep their cluster
  uint64_t fills = 0;        ///< those of them whose storage is made zeros
  uint64_t mixed = 0;        ///< shared clusters in which some subclusters stay marked as zeros
  uint64_t moving = 0;       ///< clusters, and shared tables left as they are, that a write moves
  uint64_t firstBacked = 0;  ///< guest offset of the first cluster of Action::populate
  bool backed = false;
  bool cancelled = false;
};

/// Sums up what the request lacks. Reads only.
Outcome measureDemand(Io& io, const Image& image, const Rules& rules, Refcounts* counts,
                      const CancelFlag& cancel, Demand* demand);

/// An L2 table may be changed in place only when nothing else refers to it.
Outcome isOwned(const Image& image, uint64_t l1Entry, Refcounts* counts, bool* owned);

}  // namespace thicken::qcow2
