#include <linux/fiemap.h>

#include <algorithm>

#include "readers.h"

namespace thicken {
namespace {

constexpr uint32_t kPositionFlags = FIEMAP_EXTENT_LAST | FIEMAP_EXTENT_MERGED;

HostState stateOf(uint32_t flags) {
  if (flags & (FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_DELALLOC)) return HostState::unknown;
  if (flags & FIEMAP_EXTENT_SHARED) return HostState::shared;
  if (flags & FIEMAP_EXTENT_UNWRITTEN) return HostState::unwritten;
  return HostState::written;
}

}  // namespace

bool Reading::goesOn() {
  if (!hasRoom()) return false;
  page->cancelled = cancel_.isSet();
  return !page->cancelled;
}

uint32_t Reading::room(size_t entriesEach) const {
  const size_t extents = (most_ - page->size()) / entriesEach + 1;
  return static_cast<uint32_t>(std::min<size_t>(extents, kExtentsPerCall));
}

void Reading::add(uint64_t to, HostState state, uint32_t flags) {
  if (to <= at) return;
  page->add(Range{at, to - at}, state, flags);
  at = to;
}

void Reading::addExtent(uint64_t offset, uint64_t length, uint32_t flags) {
  // The kernel rounds to its blocks, and its answer may start before what was asked for.
  const uint64_t from = std::clamp<uint64_t>(offset, at, end);
  const uint64_t to = std::clamp<uint64_t>(offset + length, from, end);
  addHole(from);
  add(to, stateOf(flags), flags & ~kPositionFlags);
}

void Reading::finish() {
  page->next = at;
  if (!isFull()) return;
  page->next = static_cast<uint64_t>(page->offset[most_]);
  page->offset.resize(most_);
  page->length.resize(most_);
  page->state.resize(most_);
  page->flags.resize(most_);
}

}  // namespace thicken
