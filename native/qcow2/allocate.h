#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#include "chunk.h"
#include "demand.h"
#include "host.h"
#include "layout.h"
#include "survey.h"

namespace thicken::qcow2 {

/// What a request takes, in clusters of the container.
struct Needed {
  uint64_t data = 0;       ///< for guest clusters; none with an external data file
  uint64_t tables = 0;     ///< new and copied L2 tables
  uint64_t refcounts = 0;  ///< refcount blocks, and a larger refcount table
  uint64_t reused = 0;     ///< leaked clusters that serve for some of `data`
  uint64_t freed = 0;      ///< an outgrown refcount table's
  uint64_t reserve = 0;    ///< for what QEMU needs anew later; behind the end, and behind `blocks`
  uint64_t blocks = 0;     ///< refcount blocks for the reserve
  uint64_t free = 0;       ///< free clusters within the file, which are then reserved too
  uint64_t counted = 0;    ///< clusters in use before, leaks included
  uint64_t stale = 0;      ///< clusters that get zeros before they are mapped, but for holes
  uint64_t mixed = 0;      ///< shared clusters in which some subclusters stay marked as zeros
  uint64_t marked = 0;     ///< all with storage that are marked as zeros, and need not be
  uint64_t bare = 0;       ///< those without, which QEMU zeroes on the host at the first write
  uint64_t fileEnd = 0;    ///< bytes: where the file ends afterwards, without the reserve
  ClusterRun area;         ///< all new clusters lie in it

  uint64_t total() const { return data + tables + refcounts; }
};

/// What a request takes of the file systems, beyond the blocks that the files hold already. Bytes.
struct HostNeeds {
  uint64_t file = 0;        ///< of the container's
  uint64_t data = 0;        ///< of the external data file's
  uint64_t later = 0;       ///< that part of `file` which finish() takes
  uint64_t unreserved = 0;  ///< that part which is for later writes, as the file is now
  uint64_t heldData = 0;    ///< of the data file, what may hold bytes that are not zeros
  // What other files share, which counts only where it can be unshared:
  uint64_t sharedFile = 0;    ///< guest clusters in the container
  uint64_t sharedData = 0;    ///< the external data file
  uint64_t sharedTables = 0;  ///< tables
};

/// What one call did.
struct Progress {
  uint64_t next = 0;       ///< guest offset where to go on
  uint64_t mapped = 0;     ///< bytes of guest clusters that were mapped
  bool cancelled = false;  ///< nothing of this piece was mapped
  bool disturbed = false;  ///< neither: somebody opened a file (Io::disturbed)
  bool reserved = true;    ///< false where the file system has no fallocate(2), so not all is
  uint64_t beside = 0;     ///< bytes that tables and counts of the request are still to take

  bool stopped() const { return cancelled || disturbed; }
};

/// Allocates guest ranges of an image in place. The caller holds the image alone, from before
/// openImage() until after finish(), and the file is a regular one. Not for several threads at
/// once. After an outcome of Code::io the object may refuse to go on (Code::stale): open the image
/// again, which finds what is left to do.
class Allocator {
 public:
  /// `dataFile` is the external data file, or nullptr.
  Allocator(Io& file, Io* dataFile, Image image);
  Allocator(const Allocator&) = delete;
  Allocator& operator=(const Allocator&) = delete;

  /// Checks the image, and finds out what the request takes. Reads only. Everything that is refused
  /// is refused here.
  Outcome prepare(const Request& request, const CancelFlag& cancel, bool* cancelled);

  const Needed& needed() const { return needed_; }

  /// Compares what is needed with what the files hold already; after prepare(). Reads only.
  /// finish() gives blocks to those tables only that this found without.
  Outcome measureHost(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs);
  /// Clusters that QEMU takes for what it needs later where the image is its own, so that nobody
  /// makes refcount blocks ahead.
  uint64_t reserveInUse() const;
  const Survey& survey() const { return survey_; }
  const Image& image() const { return image_; }

  /// Allocates the beginning of `piece`, a part of the request, and tells how far it came: at most
  /// 16 MiB of L2 tables at once. What it reports is on the disk. Cancelling and opens are polled
  /// at the beginning, and up to the first change of what is mapped: between zeros of 8 MiB.
  Outcome allocate(Range piece, const CancelFlag& cancel, Progress* progress);

  /// Frees what earlier runs leaked, gives all tables blocks of their own, reserves space for what
  /// later writes move, and syncs. When cancelled, it takes nothing more; when disturbed, it stops,
  /// and the image is to be opened again.
  Outcome finish(const CancelFlag& cancel, Progress* progress);

 private:
  struct Part {
    Range range;
    bool shared = false;
  };

  struct Choice {
    std::vector<Supply> supply;
    std::vector<ClusterRun> leaks;  ///< those in `supply` that are counted already
    ClusterRun area;
    uint64_t fresh = 0;  ///< clusters of `area` that are for guest data
    std::vector<ClusterRun> blocks;
  };

  Outcome checkRequest(const Demand& demand) const;
  Outcome planNeeded(const Demand& demand, const CancelFlag& cancel);
  void planBlocks();
  uint64_t laterClusters() const;
  Outcome growTable(uint64_t fresh);
  Outcome addBlocks(const CancelFlag& cancel, Progress* progress);
  std::vector<ClusterRun> nextBlocks(std::deque<uint64_t>* missing) const;
  Outcome addBlockRun(const std::vector<ClusterRun>& blocks);
  Outcome clearAutoclear();
  Choice choose(Chunk* chunk);
  Outcome provide(Chunk* chunk, const Choice& choice, const CancelFlag& cancel, Progress* progress);
  Outcome provideMapped(Chunk* chunk, Progress* progress);
  Outcome reserve(Io& io, Range range, bool keepSize, Progress* progress);
  Outcome extend(uint64_t end);
  Outcome checkRaw(Range piece);
  Outcome fillRange(Io& io, Range range, bool write, const CancelFlag& cancel, Progress* progress);
  Outcome fillZeros(const std::vector<Range>& ranges, bool write, const CancelFlag& cancel,
                    Progress* progress);
  Outcome commit(Chunk* chunk, const Choice& choice);
  Outcome countClusters(const Choice& choice);
  Outcome writeTables(Chunk* chunk);
  Outcome writeL1(Chunk* chunk);
  Outcome releaseOld(const Chunk& chunk);
  Outcome release(uint64_t cluster);
  bool isDisturbed();
  bool stops(const CancelFlag& cancel, Progress* progress);
  Outcome checkSizes();
  Outcome poll(const CancelFlag& cancel, Progress* progress);
  Outcome freeLeaks(Progress* progress);
  Outcome provideLater(const CancelFlag& cancel, Progress* progress);
  Outcome reserveFree(const CancelFlag& cancel, Progress* progress);
  Outcome eachFree(uint64_t end, const CancelFlag& cancel,
                   const std::function<Outcome(ClusterRun)>& use) const;
  Outcome measureTables(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs);
  Outcome provideTables(const CancelFlag& cancel, Progress* progress);
  Outcome writeHole(Range hole, const CancelFlag& cancel, Progress* progress);
  Outcome measureData(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs) const;
  Outcome measureMapped(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs) const;
  Outcome measureNew(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs) const;
  Outcome measureReserve(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs) const;
  uint64_t copiedClusters() const;
  uint64_t surelyIn(ClusterRun run, uint64_t left) const;
  Outcome planCopies(const CancelFlag& cancel);
  Outcome measureCopies(const HostFiles& files, const CancelFlag& cancel, HostNeeds* needs) const;
  Outcome addPlaces(const HostFiles& files, ClusterRun area, const CancelFlag& cancel,
                    Lacking* lacking) const;
  Outcome lower(uint64_t cluster, uint64_t by);
  void noteBeside(uint64_t clusters) { beside_ -= std::min(beside_, clusters); }
  HasBlock hasBlock() const;
  uint64_t bytes(uint64_t clusters) const { return clusters << image_.geometry.clusterBits; }

  Io& file_;
  Io* dataFile_;
  Image image_;
  Refcounts counts_;
  Request request_;
  std::unique_ptr<Rules> rules_;
  Survey survey_;
  Needed needed_;
  uint64_t next_ = 0;          ///< first cluster to choose
  uint64_t inside_ = 0;        ///< clusters that copies surely take of free ones in the file
  uint64_t beside_ = 0;        ///< clusters that tables and counts are still to take
  uint64_t dataSize_ = 0;      ///< bytes that the data file had at least
  uint64_t zeroFrom_ = 0;      ///< clusters from here on were beyond the end of the file
  std::vector<Part> lacking_;  ///< of tables, without blocks of their own
  size_t leak_ = 0;            ///< first leak that is left
  bool grown_ = false;         ///< the refcount table is large enough for the request
  bool failed_ = false;
};

}  // namespace thicken::qcow2
