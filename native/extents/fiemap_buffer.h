#pragma once

#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

#include <vector>

#include "readers.h"

namespace thicken {

/// FIEMAP, or a call that answers in its form.
struct FiemapCall {
  unsigned long request;
  const char* name;
  uint32_t flags;
};

// Without SYNC, dirty data over reserved blocks is still called unwritten, and delayed allocations
// have no place yet.
constexpr FiemapCall kFiemap{FS_IOC_FIEMAP, "ioctl(FS_IOC_FIEMAP)", FIEMAP_FLAG_SYNC};

/// Room for what such a call answers.
class FiemapBuffer {
 public:
  /// Fresh memory for each page would cost more in page faults than the extents do.
  static FiemapBuffer& ofThread() {
    thread_local FiemapBuffer buffer;
    return buffer;
  }

  /// `most`: at most kExtentsPerCall.
  Status read(int fd, FiemapCall call, Range range, uint32_t most) {
    fiemap* map = header();
    *map = fiemap{};
    map->fm_start = range.offset;
    map->fm_length = range.length;
    map->fm_flags = call.flags;
    map->fm_extent_count = most;
    if (ioctl(fd, call.request, map) < 0)
      return Status::failed(call.name, range.offset, range.length);
    return {};
  }

  uint32_t count() { return header()->fm_mapped_extents; }
  const fiemap_extent* extents() {
    return reinterpret_cast<const fiemap_extent*>(reinterpret_cast<const char*>(words_.data()) +
                                                  sizeof(fiemap));
  }

 private:
  FiemapBuffer() : words_((sizeof(fiemap) + kExtentsPerCall * sizeof(fiemap_extent)) / 8 + 1) {}

  fiemap* header() { return reinterpret_cast<fiemap*>(words_.data()); }

  std::vector<uint64_t> words_;
};

}  // namespace thicken
