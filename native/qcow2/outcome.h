#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include "../status.h"

namespace thicken::qcow2 {

/// Why an image is refused, or how work on it ended. Nothing was changed where it is not `io`.
enum class Code : uint8_t {
  ok = 0,
  io = 1,              ///< a system call failed: `status` says which
  notQcow2 = 2,        ///< another format, or a header that is cut short
  unsupported = 3,     ///< valid, but nothing that can be worked on
  unknownFeature = 4,  ///< incompatible feature bits of a later version
  dirty = 5,           ///< the dirty bit: counts may be wrong
  corruptBit = 6,      ///< QEMU marked the image as corrupt
  corrupt = 7,         ///< a value that contradicts the specification
  outsideFile = 8,     ///< a table or cluster lies beyond the end of the file
  overlap = 9,         ///< a table shares clusters with something else
  absurd = 10,         ///< a size beyond what QEMU itself opens
  needsPopulate = 11,  ///< content comes from the backing file
  stale = 12,          ///< the file changed under the work, or an earlier call failed
};

/// Stable name of a code, as ThickenError carries it.
const char* codeName(Code code);

struct Outcome {
  Code code = Code::ok;
  std::string message;  ///< what is wrong and what to do about it, without the file's name
  Status status;        ///< errno and call where code is `io`; the bytes of the file in any case

  bool ok() const { return code == Code::ok; }

  static Outcome of(const Status& status) {
    if (status.ok()) return {};
    return Outcome{Code::io, {}, status};
  }
  static Outcome refused(Code code, std::string message, Range where = {}) {
    return Outcome{code, std::move(message), Status{0, "", where.offset, where.length}};
  }
};

}  // namespace thicken::qcow2
