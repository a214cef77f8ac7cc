#include "map.h"

#include <algorithm>

namespace thicken::qcow2 {
namespace {

constexpr double kNowhere = -1;

struct Piece {
  Range guest;
  GuestState state = GuestState::unallocated;
  uint8_t flags = 0;
  uint64_t host = 0;
};

// The last extent of the page is in numbers that need no conversion while it grows.
class Collector {
 public:
  Collector(MapPage* page, size_t most) : page_(page), most_(most) {}

  // The page is one extent over its limit when full: the last but one may go on behind it.
  bool isFull() const { return page_->size() >= most_ && pending_; }
  uint64_t pendingStart() const { return last_.guest.offset; }

  void add(const Piece& piece) {
    if (pending_ && continues(piece)) {
      last_.guest.length += piece.guest.length;
      return;
    }
    flush();
    last_ = piece;
    pending_ = true;
  }

  void flush() {
    if (!pending_) return;
    pending_ = false;
    page_->offset.push_back(static_cast<double>(last_.guest.offset));
    page_->length.push_back(static_cast<double>(last_.guest.length));
    page_->host.push_back((last_.flags & kHasHost) != 0 ? static_cast<double>(last_.host)
                                                        : kNowhere);
    page_->state.push_back(static_cast<uint8_t>(last_.state));
    page_->flags.push_back(last_.flags);
  }

 private:
  bool continues(const Piece& piece) const {
    if (piece.state != last_.state || piece.flags != last_.flags) return false;
    return (piece.flags & kHasHost) == 0 || piece.host == last_.host + last_.guest.length;
  }

  MapPage* page_;
  size_t most_;
  Piece last_;
  bool pending_ = false;
};

uint8_t flagsOf(const Geometry& geometry, Entry entry) {
  if (entry.isCompressed()) return kShared;
  if (!entry.hasHost(geometry.externalData)) return 0;
  if (geometry.externalData) return kHasHost | kExternal;
  return entry.isCopied() ? kHasHost : kHasHost | kShared;
}

// As the rules have it (Action::fill).
uint8_t staysOf(const Image& image, Entry entry, uint8_t flags) {
  const bool mixed = (flags & kShared) != 0 && entry.allocated() != 0;
  return image.header.cryptMethod != 0 || mixed ? kStays : uint8_t{0};
}

GuestState stateOf(const Geometry& geometry, Entry entry) {
  if (entry.isCompressed()) return GuestState::compressed;
  const bool host = entry.hasHost(geometry.externalData);
  if (entry.isZero()) return host ? GuestState::zeroAllocated : GuestState::zeroPlain;
  return host ? GuestState::data : GuestState::unallocated;
}

void addSubclusters(const Image& image, Entry entry, Range guest, Collector* collector) {
  const Geometry& geometry = image.geometry;
  const uint64_t size = geometry.subclusterSize();
  const uint64_t start = guest.offset & ~(geometry.clusterSize() - 1);
  const bool host = entry.hasHost(geometry.externalData);
  for (uint64_t at = guest.offset; at < guest.end();) {
    const uint64_t index = (at - start) / size;
    const uint64_t end = std::min(guest.end(), start + (index + 1) * size);
    Piece piece{Range{at, end - at}, GuestState::unallocated, flagsOf(geometry, entry),
                entry.offset() + (at - start)};
    if ((entry.allocated() >> index & 1) != 0) piece.state = GuestState::data;
    if ((entry.zeroed() >> index & 1) != 0) {
      piece.state = host ? GuestState::zeroAllocated : GuestState::zeroPlain;
      if (host) piece.flags |= staysOf(image, entry, piece.flags);
    }
    collector->add(piece);
    at = end;
  }
}

Outcome faultAt(const char* fault, Range guest) {
  return Outcome::refused(Code::corrupt, std::string(fault) + "; `qemu-img check` tells more",
                          guest);
}

bool hasParts(const Geometry& geometry, Entry entry) {
  return geometry.extended && !entry.isCompressed() && entry.bitmap != kAllAllocated;
}

void addEntry(const Image& image, Entry entry, Range guest, Collector* collector) {
  const Geometry& geometry = image.geometry;
  if (hasParts(geometry, entry)) {
    addSubclusters(image, entry, guest, collector);
    return;
  }
  const uint64_t within = guest.offset & (geometry.clusterSize() - 1);
  Piece piece{guest, stateOf(geometry, entry), flagsOf(geometry, entry), entry.offset() + within};
  if (piece.state == GuestState::zeroAllocated) piece.flags |= staysOf(image, entry, piece.flags);
  collector->add(piece);
}

// Entries [*at, end) of one table.
Outcome addTable(const Image& image, const uint8_t* table, uint64_t end, uint64_t* at,
                 Collector* collector) {
  const Geometry& geometry = image.geometry;
  const uint64_t start = (*at >> geometry.clusterBits) & ~(geometry.tableEntries() - 1);
  const uint64_t last = geometry.clustersFor(end) - start;
  while (*at < end && !collector->isFull()) {
    const uint64_t cluster = *at >> geometry.clusterBits;
    EntryRun run{loadEntry(geometry, table, cluster - start)};
    // What has parts is told one by one.
    if (!hasParts(geometry, run.first)) run = loadRun(image, table, start, cluster - start, last);
    const uint64_t stop = std::min(end, (cluster + run.count) << geometry.clusterBits);
    const Range guest{*at, stop - *at};
    if (const char* fault = entryFault(image, run.first, cluster)) return faultAt(fault, guest);
    addEntry(image, run.first, guest, collector);
    *at = stop;
  }
  return {};
}

}  // namespace

Outcome MapReader::read(Range range, size_t maxExtents, const CancelFlag& cancel, MapPage* page) {
  const Geometry& geometry = image_.geometry;
  const uint64_t end = geometry.clippedEnd(range.offset, range.length);
  Collector collector(page, std::max<size_t>(maxExtents, 1));
  uint64_t at = std::min(range.offset, end);
  while (at < end && !collector.isFull()) {
    if (cancel.isSet()) {
      page->cancelled = true;
      break;
    }
    const uint64_t index = at / geometry.tableSpan();
    const uint64_t stop = std::min(end, (index + 1) * geometry.tableSpan());
    const uint8_t* table = nullptr;
    Outcome outcome = tables_.get(index, &table);
    if (outcome.ok() && table != nullptr) outcome = addTable(image_, table, stop, &at, &collector);
    if (!outcome.ok()) return outcome;
    if (table != nullptr) continue;
    collector.add(Piece{Range{at, stop - at}, GuestState::unallocated, 0, 0});
    at = stop;
  }
  if (collector.isFull()) {
    page->next = collector.pendingStart();
    return {};
  }
  collector.flush();
  page->next = at;
  return {};
}

}  // namespace thicken::qcow2
