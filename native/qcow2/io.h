#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>

#include "../status.h"

namespace thicken {

class OpenGate;

namespace qcow2 {

/// All that the qcow2 code does to a file. Tests record it, or put memory in its place.
class Io {
 public:
  virtual ~Io() = default;

  /// Reads up to `range.length` bytes; `got` is less only at the end of the file.
  virtual Status read(Range range, void* data, size_t* got) = 0;
  /// Writes all of `range`, growing the file where it ends before.
  virtual Status write(Range range, const void* data) = 0;
  /// Writes zeros over all of `range`.
  virtual Status writeZeros(Range range) = 0;
  /// Makes all of `range` read as zeros: what does already need not be written, and nothing is
  /// behind the end of the file.
  virtual Status clear(Range range) { return writeZeros(range); }
  /// Reserves blocks: fallocate(2) with FALLOC_FL_KEEP_SIZE, or without it, growing the file.
  virtual Status reserve(Range range, bool keepSize) = 0;
  /// Gives blocks that another file shares a copy (FALLOC_FL_UNSHARE_RANGE): EOPNOTSUPP but on xfs.
  virtual Status unshare(Range range) {
    return Status{EOPNOTSUPP, "fallocate", range.offset, range.length};
  }
  /// fdatasync(2): all that came before is on the disk when it returns.
  virtual Status sync() = 0;
  virtual Status size(uint64_t* bytes) = 0;
  /// Whether somebody has opened the file since it was proven that nobody else writes to it.
  virtual bool disturbed() { return false; }
};

/// A descriptor of a regular file; it stays the caller's.
class FileIo final : public Io {
 public:
  /// `directFd` is open with O_DIRECT, or -1; zeros go through it where `directAlignment` fits.
  /// `gate` watches the file, and stays the caller's.
  explicit FileIo(int fd, int directFd = -1, uint64_t directAlignment = 0, OpenGate* gate = nullptr)
      : fd_(fd), directFd_(directFd), directAlignment_(directAlignment), gate_(gate) {}

  Status read(Range range, void* data, size_t* got) override;
  Status write(Range range, const void* data) override;
  Status writeZeros(Range range) override;
  Status clear(Range range) override;
  Status reserve(Range range, bool keepSize) override;
  Status unshare(Range range) override;
  Status sync() override;
  Status size(uint64_t* bytes) override;
  bool disturbed() override;

 private:
  bool isDirect(Range range) const;
  Status readBack(Range part, void* data, size_t* got);
  Status overwrite(Range part);
  Status allocate(int mode, Range range);

  int fd_;
  int directFd_;
  uint64_t directAlignment_;
  OpenGate* gate_;
};

/// Reads exactly `range`; bytes past the end of the file are zeros.
Status readPadded(Io& io, Range range, void* data);

}  // namespace qcow2
}  // namespace thicken
