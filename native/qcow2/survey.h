#pragma once

#include <cstdint>
#include <vector>

#include "../cancel.h"
#include "header.h"

namespace thicken::qcow2 {

constexpr uint64_t kSurveyWindow = 32ull << 20;

/// A count that is higher than the number of references.
struct Excess {
  uint64_t cluster = 0;
  uint64_t surplus = 0;
};

/// What a comparison of all references with all counts found.
struct Survey {
  std::vector<ClusterRun> leaks;  ///< counted once, used by nothing; ascending
  std::vector<Excess> excess;     ///< other counts that are too high
  /// Those that can't be put right, as the one entry that refers to the cluster would need its
  /// flag; ascending. A copy of the table frees it of that.
  std::vector<Excess> flagless;
  std::vector<ClusterRun> tables;  ///< all that are no guest data; ascending, a few may be more
  /// Those with compressed data of the active image, likewise.
  std::vector<ClusterRun> packed;
  uint64_t leaked = 0;   ///< clusters that lists had no room for
  uint64_t counted = 0;  ///< clusters with a count
  uint64_t end = 0;      ///< behind the last cluster with a count
  bool cancelled = false;
};

/// Compares what refers to each host cluster with its count, as `qemu-img check` does, and refuses
/// images in which something in use is not counted, or is used twice for different things: only
/// where none is may tables be changed in place. Memory is bounded (128 MiB), larger files take
/// several passes over `window` clusters each. Leaks are listed only where the image has nothing
/// unknown.
Outcome surveyImage(Io& io, const Image& image, const CancelFlag& cancel, Survey* survey,
                    uint64_t window = kSurveyWindow);

}  // namespace thicken::qcow2
