#include "io.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

#include "zero.h"

namespace thicken {
namespace {

// O_DIRECT wants memory aligned to the device's block; 4 KiB satisfies every device in use.
constexpr size_t kMemoryAlignment = 4096;

struct FreeDeleter {
  void operator()(void* memory) const { std::free(memory); }
};

}  // namespace

Status readFully(int fd, Range range, void* data, size_t* got) {
  *got = 0;
  if (data == nullptr) return Status{ENOMEM, "malloc", range.offset, range.length};
  while (*got < range.length) {
    const ssize_t n = pread(fd, static_cast<char*>(data) + *got, range.length - *got,
                            static_cast<off_t>(range.offset + *got));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::failed("pread", range.offset, range.length);
    if (n == 0) break;
    *got += static_cast<size_t>(n);
  }
  return {};
}

Status writeZeros(int fd, Range range, Work* work) {
  const void* zeros = zeroBuffer();
  if (zeros == nullptr) return Status{ENOMEM, "mmap", range.offset, range.length};
  uint64_t at = range.offset;
  while (at < range.end()) {
    const size_t piece = std::min<uint64_t>(range.end() - at, kZeroBufferSize);
    const ssize_t n = pwrite(fd, zeros, piece, static_cast<off_t>(at));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::failed("pwrite", at, range.end() - at);
    if (n == 0) return Status{EIO, "pwrite", at, range.end() - at};
    at += static_cast<uint64_t>(n);
    work->allocated += static_cast<uint64_t>(n);
    work->requests++;
  }
  return {};
}

void startWriteback(int fd, Range range) {
  sync_file_range(fd, static_cast<off_t>(range.offset), static_cast<off_t>(range.length),
                  SYNC_FILE_RANGE_WRITE);
}

Status finishWriteback(int fd, Range range) {
  const unsigned flags =
      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (sync_file_range(fd, static_cast<off_t>(range.offset), static_cast<off_t>(range.length),
                      flags) == 0)
    return {};
  // Not for this kind of file; the sync at the end of the pass does without.
  if (errno == ESPIPE || errno == EINVAL || errno == ENOSYS) return {};
  return Status::failed("sync_file_range", range.offset, range.length);
}

void* scratchBuffer() {
  thread_local std::unique_ptr<void, FreeDeleter> buffer(
      std::aligned_alloc(kMemoryAlignment, kScratchSize));
  return buffer.get();
}

}  // namespace thicken
