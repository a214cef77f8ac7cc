#include "extents.h"

#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <memory>

namespace thicken {
namespace {

// 512 to 4,096 extents a call cost the same per extent (measured on ext4, xfs and btrfs, Linux
// 6.18); 2,048 keep the buffer at 112 KiB.
constexpr uint32_t kExtentsPerCall = 2048;
constexpr uint32_t kPositionFlags = FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED;

HostState stateOf(uint32_t flags) {
  if (flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC)) return HostState::unknown;
  if (flags & FIEMAP_EXTENT_SHARED) return HostState::shared;
  if (flags & FIEMAP_EXTENT_UNWRITTEN) return HostState::unwritten;
  return HostState::written;
}

class FiemapBuffer {
 public:
  FiemapBuffer() : words_((sizeof(fiemap) + kExtentsPerCall * sizeof(fiemap_extent)) / 8 + 1) {}

  fiemap* header() { return reinterpret_cast<fiemap*>(words_.data()); }
  const fiemap_extent* extents() {
    return reinterpret_cast<const fiemap_extent*>(reinterpret_cast<const char*>(words_.data()) +
                                                  sizeof(fiemap));
  }

  Status read(int fd, Range range, uint32_t most) {
    fiemap* map = header();
    *map = fiemap{};
    map->fm_start = range.offset;
    map->fm_length = range.length;
    // Without SYNC, dirty data over reserved blocks is still called unwritten, and delayed
    // allocations have no place yet.
    map->fm_flags = FIEMAP_FLAG_SYNC;
    map->fm_extent_count = std::min(most, kExtentsPerCall);
    if (ioctl(fd, FS_IOC_FIEMAP, map) < 0)
      return Status::failed("ioctl(FS_IOC_FIEMAP)", range.offset, range.length);
    return {};
  }

 private:
  std::vector<uint64_t> words_;
};

// The page is one entry over its limit when full: the last one may go on behind it, and is left
// for the next page.
bool isFull(const ExtentPage& page, size_t maxExtents) { return page.size() > maxExtents; }

void finishPage(ExtentPage* page, uint64_t reached, size_t maxExtents) {
  page->next = reached;
  if (!isFull(*page, maxExtents)) return;
  page->next = static_cast<uint64_t>(page->offset[maxExtents]);
  page->offset.resize(maxExtents);
  page->length.resize(maxExtents);
  page->state.resize(maxExtents);
  page->flags.resize(maxExtents);
}

Status readFiemap(int fd, Range range, size_t maxExtents, const CancelFlag& cancel,
                  ExtentPage* page) {
  // Fresh memory for each page would cost more in page faults than the extents do.
  thread_local FiemapBuffer buffer;
  const uint64_t end = range.end();
  uint64_t at = range.offset;
  bool last = false;
  while (at < end && !last && !isFull(*page, maxExtents)) {
    if (cancel.isSet()) {
      page->cancelled = true;
      break;
    }
    // With a hole before each, this many extents fill the page; more would be read in vain.
    const size_t room = (maxExtents - page->size()) / 2 + 1;
    Status status = buffer.read(fd, Range{at, end - at}, static_cast<uint32_t>(room));
    if (!status.ok()) return status;
    const uint32_t count = buffer.header()->fm_mapped_extents;
    if (count == 0) last = true;
    const uint64_t before = at;
    for (uint32_t i = 0; i < count && at < end && !isFull(*page, maxExtents); i++) {
      const fiemap_extent& extent = buffer.extents()[i];
      // The kernel rounds to its blocks, and its answer may start before what was asked for.
      const uint64_t from = std::clamp<uint64_t>(extent.fe_logical, at, end);
      const uint64_t to = std::clamp<uint64_t>(extent.fe_logical + extent.fe_length, from, end);
      if (from > at) page->add(Range{at, from - at}, HostState::hole, 0);
      if (to > from)
        page->add(Range{from, to - from}, stateOf(extent.fe_flags),
                  extent.fe_flags & ~kPositionFlags);
      at = to;
      if (extent.fe_flags & FIEMAP_EXTENT_LAST) last = true;
    }
    // Extents that lie wholly before what was asked for would be given again, for ever.
    if (at == before && !last) return Status{EIO, "ioctl(FS_IOC_FIEMAP)", at, end - at};
  }
  if (last && at < end && !isFull(*page, maxExtents)) {
    page->add(Range{at, end - at}, HostState::hole, 0);
    at = end;
  }
  finishPage(page, at, maxExtents);
  return {};
}

// cachestat(2), Linux 6.5; older C libraries have neither the number nor the structs.
constexpr long kCachestatCall = 451;
struct CachestatRange {
  uint64_t offset, length;
};
struct Cachestat {
  uint64_t cached, dirty, writeback, evicted, recentlyEvicted;
};

// tmpfs calls reserved pages holes, since they were never written; but they are in its page cache
// (or in swap), and are counted there.
Status countPages(int fd, Range range, uint64_t* count) {
  CachestatRange asked{range.offset, range.length};
  Cachestat found{};
  if (syscall(kCachestatCall, fd, &asked, &found, 0) < 0)
    return Status::failed("cachestat", range.offset, range.length);
  *count = found.cached + found.evicted;
  return {};
}

// Halves a hole until each part is either wholly reserved or wholly missing.
Status addHoleByPages(int fd, Range hole, ExtentPage* page) {
  static const uint64_t pageSize = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  std::vector<Range> parts{hole};
  while (!parts.empty()) {
    const Range part = parts.back();
    parts.pop_back();
    const uint64_t first = part.offset / pageSize;
    const uint64_t pages = (part.end() + pageSize - 1) / pageSize - first;
    uint64_t count = 0;
    Status status = countPages(fd, part, &count);
    if (!status.ok()) return status;
    if (count == 0 || count >= pages) {
      page->add(part, count == 0 ? HostState::hole : HostState::unwritten, 0);
      continue;
    }
    const uint64_t middle = (first + pages / 2) * pageSize;
    parts.push_back(Range{middle, part.end() - middle});
    parts.push_back(Range{part.offset, middle - part.offset});
  }
  return {};
}

// Bounds the work of one hole, so that a page of extents fills up in good time.
constexpr uint64_t kHolePiece = 1u << 30;

Status addHole(int fd, ExtentMethod method, Range hole, size_t maxExtents, ExtentPage* page,
               uint64_t* reached) {
  *reached = hole.offset;
  if (method != ExtentMethod::pages) {
    page->add(hole, HostState::hole, 0);
    *reached = hole.end();
  }
  while (*reached < hole.end() && !isFull(*page, maxExtents)) {
    const uint64_t to = std::min(hole.end(), (*reached / kHolePiece + 1) * kHolePiece);
    Status status = addHoleByPages(fd, Range{*reached, to - *reached}, page);
    if (!status.ok()) return status;
    *reached = to;
  }
  return {};
}

Status readSeek(int fd, ExtentMethod method, Range range, size_t maxExtents,
                const CancelFlag& cancel, ExtentPage* page) {
  const uint64_t end = range.end();
  uint64_t at = range.offset;
  while (at < end && !isFull(*page, maxExtents)) {
    if (cancel.isSet()) {
      page->cancelled = true;
      break;
    }
    off_t data = lseek(fd, static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno != ENXIO) return Status::failed("lseek(SEEK_DATA)", at, end - at);
    // ENXIO: no data from here on.
    const uint64_t from = data < 0 ? end : std::min<uint64_t>(static_cast<uint64_t>(data), end);
    if (from > at) {
      Status status = addHole(fd, method, Range{at, from - at}, maxExtents, page, &at);
      if (!status.ok()) return status;
      continue;
    }
    off_t hole = lseek(fd, static_cast<off_t>(at), SEEK_HOLE);
    if (hole < 0 && errno == ENXIO) continue;  // truncated meanwhile: the next SEEK_DATA says so
    if (hole < 0) return Status::failed("lseek(SEEK_HOLE)", at, end - at);
    const uint64_t to = std::min<uint64_t>(static_cast<uint64_t>(hole), end);
    // A hole may have been punched here since.
    if (to > at) page->add(Range{at, to - at}, HostState::written, 0);
    at = to;
  }
  finishPage(page, at, maxExtents);
  return {};
}

Status readFibmap(int fd, Range range, size_t maxExtents, const CancelFlag& cancel,
                  ExtentPage* page) {
  int blockSize = 0;
  if (ioctl(fd, FIGETBSZ, &blockSize) < 0) return Status::failed("ioctl(FIGETBSZ)");
  if (blockSize <= 0) return Status{EINVAL, "ioctl(FIGETBSZ)"};
  const uint64_t block = static_cast<uint64_t>(blockSize);
  const uint64_t end = range.end();
  uint64_t at = range.offset;
  while (at < end && !isFull(*page, maxExtents)) {
    if (cancel.isSet()) {
      page->cancelled = true;
      break;
    }
    const uint64_t index = at / block;
    if (index > INT_MAX) return Status{EFBIG, "ioctl(FIBMAP)", at, end - at};
    int number = static_cast<int>(index);
    if (ioctl(fd, FIBMAP, &number) < 0) return Status::failed("ioctl(FIBMAP)", at, end - at);
    const uint64_t to = std::min((index + 1) * block, end);
    page->add(Range{at, to - at}, number == 0 ? HostState::hole : HostState::written, 0);
    at = to;
  }
  finishPage(page, at, maxExtents);
  return {};
}

}  // namespace

void ExtentPage::add(Range range, HostState newState, uint32_t newFlags) {
  const uint8_t code = static_cast<uint8_t>(newState);
  if (size() > 0 && state.back() == code && flags.back() == newFlags) {
    length.back() += static_cast<double>(range.length);
    return;
  }
  offset.push_back(static_cast<double>(range.offset));
  length.push_back(static_cast<double>(range.length));
  state.push_back(code);
  flags.push_back(newFlags);
}

Status readExtents(int fd, ExtentMethod method, Range range, size_t maxExtents,
                   const CancelFlag& cancel, ExtentPage* page) {
  page->offset.reserve(maxExtents + 1);
  page->length.reserve(maxExtents + 1);
  page->state.reserve(maxExtents + 1);
  page->flags.reserve(maxExtents + 1);
  switch (method) {
    case ExtentMethod::fiemap:
      return readFiemap(fd, range, maxExtents, cancel, page);
    case ExtentMethod::seek:
    case ExtentMethod::pages:
      return readSeek(fd, method, range, maxExtents, cancel, page);
    case ExtentMethod::fibmap:
      return readFibmap(fd, range, maxExtents, cancel, page);
  }
  return Status{EINVAL, "readExtents"};
}

}  // namespace thicken
