#pragma once

#include <cstdint>

#include "../cancel.h"
#include "entry.h"

namespace thicken::qcow2 {

enum class Use : uint8_t {
  none = 0,
  exclusive = 1,  ///< tables that only one thing refers to
  table = 2,      ///< L2 tables: snapshots share them
  guest = 3,      ///< guest data, compressed or not
};

struct Reference {
  ClusterRun clusters;
  Use use = Use::none;
  bool active = false;  ///< from the active L1 table or a table below it
  bool copied = false;  ///< with the flag that says: counted once
  bool packed = false;  ///< of Use::guest: compressed
};

class ReferenceSink {
 public:
  virtual ~ReferenceSink() = default;
  virtual Outcome add(const Reference& reference) = 0;
};

/// Gives every reference to host clusters that the image holds, checking each value on the way.
Outcome walkReferences(Io& io, const Image& image, const CancelFlag& cancel, ReferenceSink* sink,
                       bool* cancelled);

/// Those of the bitmaps extension.
Outcome walkBitmaps(Io& io, const Image& image, ReferenceSink* sink);
/// Clusters of all bitmaps when no bit is clear. QEMU stores them anew when it closes an image, and
/// frees the old ones only then.
Outcome measureBitmaps(Io& io, const Image& image, uint64_t* clusters);

}  // namespace thicken::qcow2
