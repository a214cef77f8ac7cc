#pragma once

#include <string>
#include <vector>

#include "../qcow2/allocate.h"
#include "qcow2_memory.h"

namespace thicken_test {

struct CrashOptions {
  thicken::qcow2::Request request;
  uint64_t piece = ~0ull;  ///< guest bytes of one call
  uint64_t samples = 50;   ///< reorderings and torn writes for each set of unsynced operations
  uint64_t seed = 1;
  std::string folder;     ///< where states are written for qemu-img to judge; empty: nowhere
  uint64_t tail = 0;      ///< free clusters appended to the file, full of old bytes
  uint64_t every = 1000;  ///< every how many states
};

struct CrashResult {
  uint64_t operations = 0;
  uint64_t syncs = 0;
  uint64_t states = 0;
  uint64_t leaking = 0;  ///< states in which something was leaked
  uint64_t written = 0;
  std::string failure;  ///< the first state that is not as it must be
};

/// Records an allocation of the image in memory, and looks at the states that a crash may leave:
/// every prefix of it, and samples of what the disk may have kept of unsynced operations. Each must
/// pass a survey, read the same, and be completed by a second run that leaves no leak. Everything
/// that nothing refers to is filled with old bytes first, before either run.
CrashResult replayCrashes(const std::vector<uint8_t>& file, const std::vector<uint8_t>& data,
                          const CrashOptions& options);

/// Allocates all of the request. The refusal or failure, if there is one.
thicken::qcow2::Outcome allocateAll(thicken::qcow2::Io& file, thicken::qcow2::Io* data,
                                    const thicken::qcow2::Request& request, uint64_t piece);

}  // namespace thicken_test
