#include "allocate.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "io.h"
#include "zero.h"

namespace thicken {
namespace {

constexpr uint64_t kPiece = kZeroBufferSize;

Status checkSize(const ZeroWrite& options, Range piece) {
  struct stat facts;
  if (fstat(options.bufferedFd, &facts) < 0)
    return Status::failed("fstat", piece.offset, piece.length);
  // A write behind a truncation would grow the file again.
  if (static_cast<uint64_t>(facts.st_size) != options.expectedSize)
    return Status{ESTALE, "fstat", piece.offset, piece.length};
  return {};
}

Status writeZeroRuns(int fd, uint64_t granularity, Range piece, Work* work) {
  thread_local std::vector<Range> runs;
  runs.clear();
  uint64_t zero = 0;
  // A scratch buffer that fits the processor's cache is filled and tested at its speed: a read of
  // a hole is a memset.
  for (uint64_t at = piece.offset; at < piece.end();) {
    const Range part{at, std::min<uint64_t>(piece.end() - at, kScratchSize)};
    size_t got = 0;
    Status status = readFully(fd, part, scratchBuffer(), &got);
    if (!status.ok()) return status;
    if (got < part.length) return Status{ESTALE, "pread", part.offset, part.length};
    zero += findZeroRuns(scratchBuffer(), got, granularity, at, &runs);
    at += got;
  }
  work->skipped += piece.length - zero;
  for (const Range& run : runs) {
    Status status = writeZeros(fd, run, work);
    if (!status.ok()) return status;
  }
  return {};
}

// `reached` is where the piece starts that was not completed, or the end of the range.
Status zeroWritePieces(const ZeroWrite& options, int fd, Range range, const CancelFlag& cancel,
                       Work* work, uint64_t* reached) {
  for (*reached = range.offset; *reached < range.end();) {
    if (cancel.isSet()) {
      work->cancelled = true;
      return {};
    }
    const Range piece{*reached, std::min<uint64_t>(range.end() - *reached, kPiece)};
    Status status = checkSize(options, piece);
    if (status.ok()) status = writeZeroRuns(fd, options.granularity, piece, work);
    if (!status.ok()) return status;
    *reached += piece.length;
  }
  return {};
}

// Some file systems open with O_DIRECT and then refuse a request for its alignment (EINVAL): such a
// piece goes through the page cache.
Status zeroWriteRange(const ZeroWrite& options, Range range, const CancelFlag& cancel, Work* work,
                      bool* buffered) {
  uint64_t direct = 0;
  if (options.directFd >= 0 && options.directAlignment > 0 &&
      range.length >= options.directMinimum && range.offset % options.directAlignment == 0)
    direct = range.length - range.length % options.directAlignment;
  uint64_t reached = 0;
  Status status = zeroWritePieces(options, options.directFd, Range{range.offset, direct}, cancel,
                                  work, &reached);
  if (status.error == EINVAL) status = Status{};
  if (!status.ok() || work->cancelled || reached == range.end()) return status;
  *buffered = true;
  return zeroWritePieces(options, options.bufferedFd, Range{reached, range.end() - reached},
                         cancel, work, &reached);
}

Status startWriteback(int fd, Range range) {
  const unsigned flags =
      SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
  if (sync_file_range(fd, static_cast<off_t>(range.offset), static_cast<off_t>(range.length),
                      flags) < 0 &&
      errno != ESPIPE && errno != EINVAL && errno != ENOSYS)
    return Status::failed("sync_file_range", range.offset, range.length);
  return {};
}

}  // namespace

Status fallocateRanges(int fd, FallocateMode mode, const std::vector<Range>& ranges,
                       const CancelFlag& cancel, Work* work) {
  int flags = FALLOC_FL_KEEP_SIZE;
  if (mode == FallocateMode::unshare) flags |= FALLOC_FL_UNSHARE_RANGE;
  for (const Range& range : ranges) {
    int result;
    do {
      if (cancel.isSet()) {
        work->cancelled = true;
        return {};
      }
      result =
          fallocate(fd, flags, static_cast<off_t>(range.offset), static_cast<off_t>(range.length));
    } while (result < 0 && errno == EINTR);
    if (result < 0) return Status::failed("fallocate", range.offset, range.length);
    work->allocated += range.length;
    work->requests++;
  }
  return {};
}

Status zeroWriteRanges(const ZeroWrite& options, const std::vector<Range>& ranges,
                       const CancelFlag& cancel, Work* work) {
  bool buffered = false;
  Status status;
  for (const Range& range : ranges) {
    status = zeroWriteRange(options, range, cancel, work, &buffered);
    if (!status.ok() || work->cancelled) break;
  }
  if (!status.ok() || !buffered || ranges.empty()) return status;
  const uint64_t start = ranges.front().offset;
  return startWriteback(options.bufferedFd, Range{start, ranges.back().end() - start});
}

}  // namespace thicken
