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

bool stopped(const Work& work) { return work.cancelled || work.disturbed; }

Status checkSize(int fd, uint64_t expected, Range piece) {
  if (expected == kAnySize) return {};
  struct stat facts;
  if (fstat(fd, &facts) < 0) return Status::failed("fstat", piece.offset, piece.length);
  if (static_cast<uint64_t>(facts.st_size) != expected)
    return Status{ESTALE, "fstat", piece.offset, piece.length};
  return {};
}

bool isAligned(const ZeroWrite& options, Range range) {
  return options.directFd >= 0 && options.directAlignment > 0 &&
         range.offset % options.directAlignment == 0 && range.length % options.directAlignment == 0;
}

// Reads past the page cache where that works: a buffered read of a hole would fill the cache with
// zeros that nobody asked for.
Status readBack(const ZeroWrite& options, Range part, void* data) {
  size_t got = 0;
  Status status{EINVAL};
  if (isAligned(options, part)) status = readFully(options.directFd, part, data, &got);
  if (status.error == EINVAL) status = readFully(options.bufferedFd, part, data, &got);
  if (status.ok() && got < part.length) return Status{ESTALE, "pread", part.offset, part.length};
  return status;
}

Status writeZeroRuns(const ZeroWrite& options, int fd, Range piece, Work* work) {
  thread_local std::vector<Range> runs;
  runs.clear();
  uint64_t zero = 0;
  // A scratch buffer that fits the processor's cache is filled and tested at its speed: a read of
  // a hole is a memset.
  for (uint64_t at = piece.offset; at < piece.end();) {
    const Range part{at, std::min<uint64_t>(piece.end() - at, kScratchSize)};
    Status status = readBack(options, part, scratchBuffer());
    if (!status.ok()) return status;
    zero += findZeroRuns(scratchBuffer(), part.length, options.granularity, at, &runs);
    at += part.length;
  }
  work->skipped += piece.length - zero;
  for (const Range& run : runs) {
    // A write behind a truncation would grow the file again.
    Status status = checkSize(options.bufferedFd, options.expectedSize, run);
    if (status.ok()) status = writeZeros(fd, run, work);
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
    const Work before = *work;
    const GatePass pass(options.gate);
    if (!pass.granted()) {
      work->disturbed = true;
      return {};
    }
    Status status = writeZeroRuns(options, fd, piece, work);
    // Such a piece is done again in another way, and counted then.
    if (status.error == EINVAL) *work = before;
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
  if (options.directAlignment > 0 && range.length >= options.directMinimum)
    direct = range.length - range.length % options.directAlignment;
  if (!isAligned(options, Range{range.offset, direct})) direct = 0;
  uint64_t reached = 0;
  Status status = zeroWritePieces(options, options.directFd, Range{range.offset, direct}, cancel,
                                  work, &reached);
  if (status.error == EINVAL) status = Status{};
  if (!status.ok() || stopped(*work) || reached == range.end()) return status;
  *buffered = true;
  return zeroWritePieces(options, options.bufferedFd, Range{reached, range.end() - reached}, cancel,
                         work, &reached);
}

Status fallocateSpan(int fd, int flags, Range span) {
  int result;
  do
    result = fallocate(fd, flags, static_cast<off_t>(span.offset), static_cast<off_t>(span.length));
  while (result < 0 && errno == EINTR);
  return result < 0 ? Status::failed("fallocate", span.offset, span.length) : Status{};
}

// Of one call, in bytes. Between larger holes a call's own cost is nothing, and ext4 took 1.6 times
// as long for 64 holes of 24 MiB in one call as for one at a time (Linux 6.18).
constexpr uint64_t kLongestSpan = 128ULL << 20;

Range spanOf(const std::vector<Range>& ranges, size_t first, size_t end) {
  return Range{ranges[first].offset, ranges[end - 1].end() - ranges[first].offset};
}

// Where the ranges end that share the call of the first.
size_t endOfSpan(const std::vector<Range>& ranges, size_t first, size_t most) {
  size_t end = first + 1;
  while (end < ranges.size() && end - first < most &&
         spanOf(ranges, first, end + 1).length <= kLongestSpan)
    end++;
  return end;
}

// `done`: where the ranges start that are still to do.
Status fallocateEach(const Fallocate& options, int flags, const std::vector<Range>& ranges,
                     size_t* done, size_t end, Work* work) {
  for (; *done < end; ++*done) {
    const Status status = fallocateSpan(options.fd, flags, ranges[*done]);
    if (!status.ok()) return status;
    work->requests++;
    work->allocated += ranges[*done].length;
  }
  return {};
}

// xfs wants as much free space as the span is long, blocks that are there already included (Linux
// 6.18): with less, hole by hole.
Status fallocateShared(const Fallocate& options, int flags, const std::vector<Range>& ranges,
                       size_t* done, size_t end, Work* work) {
  const Status status = fallocateSpan(options.fd, flags, spanOf(ranges, *done, end));
  const bool full = status.error == ENOSPC || status.error == EDQUOT;
  if (full && end - *done > 1) return fallocateEach(options, flags, ranges, done, end, work);
  if (!status.ok()) return status;
  work->requests++;
  for (; *done < end; ++*done) work->allocated += ranges[*done].length;
  return {};
}

}  // namespace

Status fallocateRanges(const Fallocate& options, const std::vector<Range>& ranges,
                       const CancelFlag& cancel, Work* work) {
  int flags = FALLOC_FL_KEEP_SIZE;
  if (options.mode == FallocateMode::unshare) flags |= FALLOC_FL_UNSHARE_RANGE;
  for (size_t done = 0; done < ranges.size();) {
    if (cancel.isSet()) {
      work->cancelled = true;
      return {};
    }
    const size_t end = endOfSpan(ranges, done, options.rangesPerCall);
    Status status = checkSize(options.fd, options.expectedSize, spanOf(ranges, done, end));
    if (status.ok()) status = fallocateShared(options, flags, ranges, &done, end, work);
    if (!status.ok()) return status;
  }
  return {};
}

Status zeroWriteRanges(const ZeroWrite& options, const std::vector<Range>& ranges,
                       const CancelFlag& cancel, Work* work) {
  bool buffered = false;
  Status status;
  for (const Range& range : ranges) {
    status = zeroWriteRange(options, range, cancel, work, &buffered);
    if (!status.ok() || stopped(*work)) break;
  }
  if (!status.ok()) return status;
  if (buffered) {
    const uint64_t start = ranges.front().offset;
    startWriteback(options.bufferedFd, Range{start, ranges.back().end() - start});
  }
  if (options.settle.length == 0) return {};
  return finishWriteback(options.bufferedFd, options.settle);
}

}  // namespace thicken
