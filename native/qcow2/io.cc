#include "io.h"

#include <fcntl.h>
#include <linux/falloc.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "../gate.h"
#include "../io.h"
#include "../zero.h"

namespace thicken::qcow2 {
namespace {

constexpr uint64_t kWritePiece = 2u << 20;

}  // namespace

Status FileIo::read(Range range, void* data, size_t* got) {
  *got = 0;
  return range.length == 0 ? Status{} : readFully(fd_, range, data, got);
}

Status FileIo::write(Range range, const void* data) {
  uint64_t done = 0;
  while (done < range.length) {
    const uint64_t length = std::min(kWritePiece, range.length - done);
    const auto offset = static_cast<off_t>(range.offset + done);
    const ssize_t n = pwrite(fd_, static_cast<const char*>(data) + done, length, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::failed("pwrite", range.offset + done, range.length - done);
    if (n == 0) return Status{EIO, "pwrite", range.offset + done, range.length - done};
    const Range piece{range.offset + done, static_cast<uint64_t>(n)};
    done += piece.length;
    // The disk takes it while the next piece is copied; the sync that follows waits for it.
    if (range.length > kWritePiece) startWriteback(fd_, piece);
  }
  return {};
}

bool FileIo::isDirect(Range range) const {
  return directFd_ >= 0 && directAlignment_ > 0 && range.offset % directAlignment_ == 0 &&
         range.length % directAlignment_ == 0;
}

Status FileIo::writeZeros(Range range) {
  Work work;
  if (!isDirect(range)) return thicken::writeZeros(fd_, range, &work);
  Status status = thicken::writeZeros(directFd_, range, &work);
  // Some file systems open with O_DIRECT and refuse requests for their alignment.
  if (status.error == EINVAL) status = thicken::writeZeros(fd_, range, &work);
  return status;
}

// What is read decides, not SEEK_DATA: file systems have told holes where unwritten pages had data
// (OpenZFS before 2.2.2, FUSE with a write-back cache). To read a hole is a memset.
Status FileIo::clear(Range range) {
  for (uint64_t at = range.offset; at < range.end();) {
    const Range part{at, std::min<uint64_t>(range.end() - at, kScratchSize)};
    size_t got = 0;
    Status status = readBack(part, scratchBuffer(), &got);
    if (status.ok() && !isZero(scratchBuffer(), got)) status = overwrite(Range{at, got});
    if (!status.ok() || got < part.length) return status;
    at += part.length;
  }
  return {};
}

// A write behind a truncation would grow the file again.
Status FileIo::overwrite(Range part) {
  uint64_t end = 0;
  Status status = size(&end);
  if (status.ok() && end < part.end()) status = Status{ESTALE, "fstat", part.offset, part.length};
  return status.ok() ? writeZeros(part) : status;
}

// Past the page cache where that works: a hole would fill it with zeros.
Status FileIo::readBack(Range part, void* data, size_t* got) {
  Status status{EINVAL};
  if (isDirect(part)) status = readFully(directFd_, part, data, got);
  if (status.error == EINVAL) status = readFully(fd_, part, data, got);
  return status;
}

Status FileIo::reserve(Range range, bool keepSize) {
  return allocate(keepSize ? FALLOC_FL_KEEP_SIZE : 0, range);
}

Status FileIo::unshare(Range range) {
  return allocate(FALLOC_FL_KEEP_SIZE | FALLOC_FL_UNSHARE_RANGE, range);
}

Status FileIo::allocate(int mode, Range range) {
  int result;
  do
    result =
        fallocate(fd_, mode, static_cast<off_t>(range.offset), static_cast<off_t>(range.length));
  while (result < 0 && errno == EINTR);
  return result < 0 ? Status::failed("fallocate", range.offset, range.length) : Status{};
}

Status FileIo::sync() { return fdatasync(fd_) < 0 ? Status::failed("fdatasync") : Status{}; }

Status FileIo::size(uint64_t* bytes) {
  struct stat facts {};
  if (fstat(fd_, &facts) < 0) return Status::failed("fstat");
  *bytes = static_cast<uint64_t>(facts.st_size);
  return {};
}

bool FileIo::disturbed() { return gate_ != nullptr && gate_->disturbed(); }

Status readPadded(Io& io, Range range, void* data) {
  if (range.length == 0) return {};
  size_t got = 0;
  Status status = io.read(range, data, &got);
  if (status.ok() && got < range.length)
    std::memset(static_cast<char*>(data) + got, 0, range.length - got);
  return status;
}

}  // namespace thicken::qcow2
