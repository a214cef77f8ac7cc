#include <linux/fs.h>
#include <linux/magic.h>
#include <sys/ioctl.h>
#include <sys/vfs.h>

#include <algorithm>

#include "fiemap_buffer.h"
#include "readers.h"

namespace thicken {
namespace {

// Two calls in place of one: FIEMAP is quicker for fewer.
constexpr uint32_t kFew = 16;

constexpr uint64_t kSector = 512;
constexpr uint64_t kLargestBlock = 64 << 10;  // of xfs

// linux/ext4.h, Linux 5.4: what FIEMAP itself asks first, without a walk through the layers for
// each extent. Other drivers with ext4's magic don't know the number.
constexpr FiemapCall kExt4Status{_IOWR('f', 42, struct fiemap), "ioctl(EXT4_IOC_GET_ES_CACHE)", 0};
constexpr uint32_t kExt4Hole = 0x08000000;

// ioctl_xfs_getbmapx(2), from xfs/xfs_fs.h.
struct XfsExtent {
  int64_t offset, block, length;
  int32_t count, entries, wanted, flags, unused[2];
};
struct XfsRequest {
  int64_t offset, block, length;
  int32_t count, entries;
};
constexpr unsigned long kXfsMap = _IOWR('X', 56, XfsRequest);
constexpr int32_t kXfsWanted = 0x4 | 0x8 | 0x10;  // PREALLOC, DELALLOC, NO_HOLES
constexpr int32_t kXfsPreallocated = 0x1, kXfsDelayed = 0x2, kXfsShared = 0x8;

// A call that is not known here is FIEMAP's to make up for; another error is told.
Status unlessUnknown(Status status) {
  switch (status.error) {
    case ENOTTY:
    case EOPNOTSUPP:
    case EINVAL:
    case ENOSYS:
    case EPERM:
    case EACCES:
      return {};
    default:
      return status;
  }
}

// The extents that ext4 has in memory (extent status tree), holes among them. What it has not lies
// between two entries, or ends the answer; LAST only means the last in memory, and is FIEMAP's
// where the range goes on: it may end at the largest offset, behind which FIEMAP can't be asked.
// Delayed ones are from writes since the sync, and told by FIEMAP.
Status readExt4(Reading* reading) {
  FiemapBuffer& buffer = FiemapBuffer::ofThread();
  while (reading->goesOn()) {
    const uint64_t before = reading->at;
    Status status = buffer.read(reading->fd, kExt4Status, reading->rest(), reading->room(1));
    if (!status.ok()) return unlessUnknown(status);
    for (uint32_t i = 0; i < buffer.count() && reading->hasRoom(); i++) {
      const fiemap_extent& extent = buffer.extents()[i];
      const uint64_t extentEnd = extent.fe_logical + extent.fe_length;
      if (extent.fe_logical > reading->at || (extent.fe_flags & FIEMAP_EXTENT_DELALLOC)) return {};
      if ((extent.fe_flags & FIEMAP_EXTENT_LAST) && extentEnd < reading->end) return {};
      if (extent.fe_flags & kExt4Hole)
        reading->addHole(std::clamp(extentEnd, reading->at, reading->end));
      else
        reading->addExtent(extent.fe_logical, extent.fe_length, extent.fe_flags);
    }
    if (reading->at == before) break;
  }
  return {};
}

uint32_t fiemapFlags(int32_t flags) {
  return (flags & kXfsPreallocated ? FIEMAP_EXTENT_UNWRITTEN : 0) |
         (flags & kXfsShared ? FIEMAP_EXTENT_SHARED : 0);
}

class XfsBuffer {
 public:
  XfsBuffer() : entries_(kExtentsPerCall + 1) {}

  Status read(int fd, Range range, uint32_t most) {
    entries_[0] = {};
    // Whole blocks: xfs rounds the offset down and the length up, each by itself, and would stop
    // short of the end of others.
    const uint64_t from = range.offset / kLargestBlock * kLargestBlock;
    const uint64_t to = (range.end() + kLargestBlock - 1) / kLargestBlock * kLargestBlock;
    entries_[0].offset = static_cast<int64_t>(from / kSector);
    entries_[0].length = static_cast<int64_t>((to - from) / kSector);
    entries_[0].count = static_cast<int32_t>(most + 1);
    entries_[0].wanted = kXfsWanted;
    if (ioctl(fd, kXfsMap, entries_.data()) < 0)
      return Status::failed("ioctl(XFS_IOC_GETBMAPX)", range.offset, range.length);
    return {};
  }

  uint32_t count() const { return static_cast<uint32_t>(entries_[0].entries); }
  const XfsExtent* extents() const { return entries_.data() + 1; }

 private:
  std::vector<XfsExtent> entries_;
};

// XFS's own call takes its lock once for all of an answer, where FIEMAP takes it for each extent
// and each hole: a third of the time (Linux 6.18).
Status readXfs(Reading* reading) {
  thread_local XfsBuffer buffer;
  while (reading->goesOn()) {
    const uint64_t before = reading->at;
    const uint32_t most = reading->room(2);
    Status status = buffer.read(reading->fd, reading->rest(), most);
    if (!status.ok()) return unlessUnknown(status);
    for (uint32_t i = 0; i < buffer.count() && reading->hasRoom(); i++) {
      const XfsExtent& extent = buffer.extents()[i];
      // From a write since the sync, and told by FIEMAP, which lets none in between.
      if (extent.flags & kXfsDelayed) return {};
      reading->addExtent(static_cast<uint64_t>(extent.offset) * kSector,
                         static_cast<uint64_t>(extent.length) * kSector, fiemapFlags(extent.flags));
    }
    if (buffer.count() < most && reading->hasRoom()) reading->addHole(reading->end);
    if (reading->at == before) break;
  }
  return {};
}

// Writes dirty data out as FIEMAP does, once for a page. A failed write-back is told to one call
// alone, and this one must not lose it.
Status syncFile(Reading* reading) {
  return FiemapBuffer::ofThread().read(reading->fd, kFiemap, Range{reading->at, 1}, 1);
}

}  // namespace

Status readQuickly(Reading* reading) {
  struct statfs about {};
  if (fstatfs(reading->fd, &about) < 0) return Status::failed("fstatfs");
  const bool isExt4 = about.f_type == EXT4_SUPER_MAGIC;
  if (!isExt4 && about.f_type != XFS_SUPER_MAGIC) return {};
  if (!reading->goesOn() || reading->room(2) < kFew) return {};
  Status status = syncFile(reading);
  if (!status.ok()) return status;
  return isExt4 ? readExt4(reading) : readXfs(reading);
}

}  // namespace thicken
