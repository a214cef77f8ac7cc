#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

namespace thicken_test {

enum class Kind : uint8_t { hole, unwritten, data };

struct Segment {
  Kind kind;
  uint64_t length;
};

inline void require(bool holds, const char* what) {
  if (holds) return;
  std::perror(what);
  std::abort();
}

/// A file that is gone with its object.
class TemporaryFile {
 public:
  TemporaryFile() : path_(folder() + "/thicken-unit-XXXXXX") {
    fd_ = mkstemp(path_.data());
    require(fd_ >= 0, "mkstemp");
  }
  ~TemporaryFile() {
    closeWriter();
    unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  static std::string& folder() {
    static std::string path = ".";
    return path;
  }

  void closeWriter() {
    if (fd_ >= 0) close(fd_);
    fd_ = -1;
  }

  int fd() const { return fd_; }

  int open(int flags) const {
    const int fd = ::open(path_.c_str(), flags | O_CLOEXEC);
    require(fd >= 0, "open");
    return fd;
  }

  void resize(uint64_t size) {
    require(ftruncate(fd_, static_cast<off_t>(size)) == 0, "ftruncate");
  }

  void write(uint64_t offset, const std::vector<uint8_t>& bytes) {
    const ssize_t n = pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset));
    require(n == static_cast<ssize_t>(bytes.size()), "pwrite");
  }

  /// Returns false where the file system can't.
  bool reserve(uint64_t offset, uint64_t length) {
    return fallocate(fd_, FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                     static_cast<off_t>(length)) == 0;
  }

  std::vector<uint8_t> read(uint64_t offset, uint64_t length) const {
    std::vector<uint8_t> bytes(length);
    const ssize_t n = pread(fd_, bytes.data(), length, static_cast<off_t>(offset));
    require(n >= 0, "pread");
    bytes.resize(static_cast<size_t>(n));
    return bytes;
  }

  void sync() { require(fsync(fd_) == 0, "fsync"); }

  /// The size is set first: then no file system preallocates behind the writes. False where it
  /// can't make unwritten segments.
  bool lay(const std::vector<Segment>& segments) {
    uint64_t size = 0;
    for (const Segment& segment : segments) size += segment.length;
    resize(size);
    uint64_t at = 0;
    for (const Segment& segment : segments) {
      if (segment.kind == Kind::data) write(at, std::vector<uint8_t>(segment.length, 0xa5));
      if (segment.kind == Kind::unwritten && !reserve(at, segment.length)) return false;
      at += segment.length;
    }
    sync();
    return true;
  }

 private:
  std::string path_;
  int fd_ = -1;
};

}  // namespace thicken_test
