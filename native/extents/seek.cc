#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

#include "readers.h"

namespace thicken {
namespace {

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
Status addHoleByPages(Reading* reading, uint64_t holeEnd) {
  static const uint64_t pageSize = static_cast<uint64_t>(sysconf(_SC_PAGESIZE));
  std::vector<Range> parts{Range{reading->at, holeEnd - reading->at}};
  while (!parts.empty()) {
    const Range part = parts.back();
    parts.pop_back();
    const uint64_t first = part.offset / pageSize;
    const uint64_t pages = (part.end() + pageSize - 1) / pageSize - first;
    uint64_t count = 0;
    Status status = countPages(reading->fd, part, &count);
    if (!status.ok()) return status;
    if (count == 0 || count >= pages) {
      reading->add(part.end(), count == 0 ? HostState::hole : HostState::unwritten, 0);
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

Status addHoleInPieces(Reading* reading, uint64_t holeEnd) {
  while (reading->at < holeEnd && reading->hasRoom()) {
    const uint64_t to = std::min(holeEnd, (reading->at / kHolePiece + 1) * kHolePiece);
    Status status = addHoleByPages(reading, to);
    if (!status.ok()) return status;
  }
  return {};
}

Status addData(Reading* reading) {
  const Range rest = reading->rest();
  const off_t hole = lseek(reading->fd, static_cast<off_t>(rest.offset), SEEK_HOLE);
  if (hole < 0 && errno == ENXIO) return {};  // truncated meanwhile: the next SEEK_DATA says so
  if (hole < 0) return Status::failed("lseek(SEEK_HOLE)", rest.offset, rest.length);
  // A hole may have been punched here since.
  reading->add(std::min(static_cast<uint64_t>(hole), reading->end), HostState::written, 0);
  return {};
}

}  // namespace

Status readSeek(Reading* reading, bool pages) {
  while (reading->goesOn()) {
    const Range rest = reading->rest();
    const off_t data = lseek(reading->fd, static_cast<off_t>(rest.offset), SEEK_DATA);
    if (data < 0 && errno != ENXIO)
      return Status::failed("lseek(SEEK_DATA)", rest.offset, rest.length);
    // ENXIO: no data from here on.
    const uint64_t from =
        data < 0 ? reading->end : std::min(static_cast<uint64_t>(data), reading->end);
    Status status;
    if (from <= rest.offset)
      status = addData(reading);
    else if (pages)
      status = addHoleInPieces(reading, from);
    else
      reading->addHole(from);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace thicken
