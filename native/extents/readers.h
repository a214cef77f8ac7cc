#pragma once

#include "../extents.h"

namespace thicken {

/// The kernel's batches: 512 to 4,096 extents a call cost the same for each (measured on ext4, xfs
/// and btrfs, Linux 6.18); 2,048 keep the buffers at about 100 KiB.
constexpr uint32_t kExtentsPerCall = 2048;

/// A page of extents as it is read: all before `at` is in it, without gaps.
class Reading {
 public:
  Reading(int file, Range range, size_t maxExtents, const CancelFlag& cancel, ExtentPage* into)
      : fd(file),
        end(range.end()),
        page(into),
        at(range.offset),
        most_(maxExtents),
        cancel_(cancel) {}

  const int fd;
  const uint64_t end;
  ExtentPage* const page;
  uint64_t at;

  Range rest() const { return Range{at, end - at}; }
  bool hasRoom() const { return at < end && !isFull(); }
  /// The same, to be asked before each call of the kernel.
  bool goesOn();
  /// How many extents fill the page, and a call may bring; more would be read in vain. With a hole
  /// before each, an extent is two entries of the page.
  uint32_t room(size_t entriesEach) const;

  void add(uint64_t to, HostState state, uint32_t flags);
  void addHole(uint64_t to) { add(to, HostState::hole, 0); }
  /// An extent as the kernel tells it, with its FIEMAP_EXTENT_* flags, and the hole before it.
  void addExtent(uint64_t offset, uint64_t length, uint32_t flags);

  void finish();

 private:
  // The page is one entry over its limit when full: the last one may go on behind it, and is left
  // for the next page.
  bool isFull() const { return page->size() > most_; }

  const size_t most_;
  const CancelFlag& cancel_;
};

/// FIEMAP with FIEMAP_FLAG_SYNC (Documentation/filesystems/fiemap.rst).
Status readFiemap(Reading* reading);

/// What FIEMAP would answer, from where ext4 and xfs have it at hand. Ends early where they can't
/// tell: another file system, an older kernel, an extent that is not in memory. The rest is
/// FIEMAP's.
Status readQuickly(Reading* reading);

/// SEEK_HOLE and SEEK_DATA (lseek(2)); with `pages`, holes are told apart by cachestat(2).
Status readSeek(Reading* reading, bool pages);

/// FIBMAP, a block at a time; needs CAP_SYS_RAWIO.
Status readFibmap(Reading* reading);

}  // namespace thicken
