#include "tables.h"

#include <algorithm>

namespace thicken::qcow2 {

Outcome TableReader::get(uint64_t index, const uint8_t** table) {
  *table = nullptr;
  if (index >= l1_.size() || (l1_[index] & kOffsetMask) == 0) return {};
  if (index < first_ || index >= end_) {
    Outcome outcome = load(index);
    if (!outcome.ok()) return outcome;
  }
  const uint64_t place = places_[index - first_];
  *table = bytes_.data() + (place - 1) * image_.geometry.clusterSize();
  return {};
}

Outcome TableReader::load(uint64_t index) {
  const uint64_t size = image_.geometry.clusterSize();
  const uint64_t most = std::max<uint64_t>(1, batch_ / size);
  // Entries without a table cost nothing, but a table far away is none of this batch's.
  const uint64_t furthest = std::min<uint64_t>(l1_.size(), index + most * 8);
  places_.clear();
  std::vector<uint64_t> offsets;
  first_ = end_ = index;
  for (; end_ < furthest && offsets.size() < most; end_++) {
    const uint64_t offset = l1_[end_] & kOffsetMask;
    if (offset != 0) offsets.push_back(offset);
    places_.push_back(offset == 0 ? 0 : offsets.size());
  }
  if (bytes_.size() < offsets.size() * size) bytes_.resize(offsets.size() * size);
  for (size_t i = 0; i < offsets.size();) {
    size_t next = i + 1;
    while (next < offsets.size() && offsets[next] == offsets[next - 1] + size) next++;
    Status status = readPadded(io_, Range{offsets[i], (next - i) * size}, bytes_.data() + i * size);
    if (!status.ok()) {
      end_ = first_;
      return Outcome::of(status);
    }
    i = next;
  }
  return {};
}

}  // namespace thicken::qcow2
