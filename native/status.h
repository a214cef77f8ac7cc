#pragma once

#include <cerrno>
#include <cstdint>

namespace thicken {

/// Outcome of a system call: errno and the call's name, and the bytes of the file that it was
/// about.
struct Status {
  int error = 0;
  const char* syscall = "";
  uint64_t offset = 0;
  uint64_t length = 0;

  bool ok() const { return error == 0; }

  static Status failed(const char* syscall, uint64_t offset = 0, uint64_t length = 0) {
    return Status{errno, syscall, offset, length};
  }
};

/// A byte range of a file or device.
struct Range {
  uint64_t offset = 0;
  uint64_t length = 0;

  uint64_t end() const { return offset + length; }
};

/// What a bounded piece of allocating work did, also when it ended early.
struct Work {
  uint64_t allocated = 0;  ///< bytes that got storage
  uint64_t skipped = 0;    ///< bytes left alone because they hold data by now
  uint64_t requests = 0;   ///< system calls that changed the file or device
  bool cancelled = false;
  bool disturbed = false;  ///< ended early: somebody opened the image (OpenGate)
};

}  // namespace thicken
