#include "host.h"

#include <algorithm>
#include <numeric>

namespace thicken::qcow2 {
namespace {

// A lone extent of a scattered image costs one system call, and few extents beside it.
constexpr size_t kFewExtents = 8;
constexpr size_t kManyExtents = 4096;
// Of the smallest clusters, many tables fit into one read.
constexpr uint64_t kTableBatch = 128u << 10;

struct Piece {
  Range host;
  HostState state = HostState::unknown;
  uint32_t flags = 0;
};

// What the host says about one guest extent.
struct Answer {
  size_t first = 0;
  size_t count = 0;
  uint64_t covered = 0;  // bytes from its start on
  bool asked = false;
};

JoinedState joinedOf(GuestState state, uint8_t flags, bool hasBacking) {
  const bool shared = (flags & kShared) != 0;
  const bool stays = (flags & kStays) != 0;
  switch (state) {
    case GuestState::compressed:
      return JoinedState::compressed;
    case GuestState::zeroPlain:
      return JoinedState::zeros;
    case GuestState::zeroAllocated:
      if (stays) return shared ? JoinedState::snapshotKept : JoinedState::kept;
      return shared ? JoinedState::snapshotZeros : JoinedState::zeroed;
    case GuestState::data:
      return shared ? JoinedState::snapshotData : JoinedState::data;
    case GuestState::unallocated:
      break;
  }
  if (hasBacking) return JoinedState::below;
  return (flags & kHasHost) != 0 ? JoinedState::part : JoinedState::unmapped;
}

class Join {
 public:
  Join(const Image& image, const HostFiles& files, size_t most, const CancelFlag& cancel)
      : hasBacking_(image.header.hasBacking),
        files_(files),
        most_(most),
        cancel_(cancel),
        host_(files.fd, files.method),
        data_(files.dataFd, files.dataMethod) {}

  Status run(const MapPage& guest, JoinedPage* page) {
    answers_.assign(guest.size(), Answer{});
    Status status = ask(guest);
    if (status.ok() && !cancel_.isSet()) assemble(guest, page);
    page->cancelled = cancel_.isSet();
    return status;
  }

 private:
  bool hasHost(const MapPage& guest, size_t i) const {
    if ((guest.flags[i] & kHasHost) == 0) return false;
    const auto state = static_cast<GuestState>(guest.state[i]);
    return joinedOf(state, guest.flags[i], hasBacking_) >= JoinedState::data;
  }

  // The first extent is asked about first, so that every page makes progress; the others in the
  // order of their places on the host.
  Status ask(const MapPage& guest) {
    std::vector<size_t> order;
    uint64_t limit = 0;
    for (size_t i = 0; i < guest.size(); i++) {
      if (!hasHost(guest, i)) continue;
      order.push_back(i);
      limit = std::max(limit, static_cast<uint64_t>(guest.host[i] + guest.length[i]));
    }
    if (order.empty()) return {};
    std::sort(order.begin() + 1, order.end(),
              [&](size_t a, size_t b) { return guest.host[a] < guest.host[b]; });
    for (const size_t i : order) {
      if (pieces_.size() >= 4 * most_ || cancel_.isSet()) break;
      Status status = askOne(guest, i, limit);
      if (!status.ok()) return status;
    }
    return {};
  }

  Status askOne(const MapPage& guest, size_t i, uint64_t limit) {
    const Range range{static_cast<uint64_t>(guest.host[i]), static_cast<uint64_t>(guest.length[i])};
    Answer& answer = answers_[i];
    answer.asked = true;
    answer.first = pieces_.size();
    HostLookup& lookup = (guest.flags[i] & kExternal) != 0 ? data_ : host_;
    return lookup.find(range, limit, cancel_, [&](Range part, HostState state, uint32_t flags) {
      pieces_.push_back(Piece{part, state, flags});
      answer.count++;
      answer.covered += part.length;
      return answer.count < most_;
    });
  }

  // Up to where the first answer is missing, or came in part.
  void assemble(const MapPage& guest, JoinedPage* page) {
    for (size_t i = 0; i < guest.size(); i++) {
      const auto state =
          joinedOf(static_cast<GuestState>(guest.state[i]), guest.flags[i], hasBacking_);
      const auto offset = static_cast<uint64_t>(guest.offset[i]);
      const auto length = static_cast<uint64_t>(guest.length[i]);
      page->next = offset;
      if (!hasHost(guest, i)) {
        add(page, Range{offset, length}, static_cast<uint8_t>(state), 0, -1);
      } else {
        const Answer& answer = answers_[i];
        if (!answer.asked) return;
        addPieces(page, offset, state, answer);
        page->next = offset + answer.covered;
        if (answer.covered < length) return;
      }
      page->next = offset + length;
    }
    page->next = guest.next;
  }

  void addPieces(JoinedPage* page, uint64_t offset, JoinedState state, const Answer& answer) {
    for (size_t i = answer.first; i < answer.first + answer.count; i++) {
      const Piece& piece = pieces_[i];
      const auto code =
          static_cast<uint8_t>(static_cast<uint8_t>(state) + static_cast<uint8_t>(piece.state));
      add(page, Range{offset, piece.host.length}, code, piece.flags,
          static_cast<double>(piece.host.offset));
      offset += piece.host.length;
    }
  }

  static void add(JoinedPage* page, Range guest, uint8_t state, uint32_t flags, double host) {
    page->offset.push_back(static_cast<double>(guest.offset));
    page->length.push_back(static_cast<double>(guest.length));
    page->state.push_back(state);
    page->flags.push_back(flags);
    page->host.push_back(host);
  }

  bool hasBacking_;
  const HostFiles& files_;
  size_t most_;
  const CancelFlag& cancel_;
  HostLookup host_;
  HostLookup data_;
  std::vector<Piece> pieces_;
  std::vector<Answer> answers_;
};

}  // namespace

Status HostLookup::load(uint64_t from, uint64_t limit, const CancelFlag& cancel) {
  budget_ = from == end_ ? std::min(kManyExtents, budget_ * 4) : budget_ / 2;
  budget_ = std::max(budget_, kFewExtents);
  page_.offset.clear();
  page_.length.clear();
  page_.state.clear();
  page_.flags.clear();
  start_ = end_ = from;
  at_ = 0;
  Status status = readExtents(fd_, method_, Range{from, limit - from}, budget_, cancel, &page_);
  if (status.ok()) end_ = page_.next;
  return status;
}

// From where the last look ended: the next one is near.
void HostLookup::seek(uint64_t offset) {
  if (at_ >= page_.size() || static_cast<uint64_t>(page_.offset[at_]) > offset) at_ = 0;
  const auto from = page_.offset.begin() + static_cast<ptrdiff_t>(at_);
  const auto found = std::upper_bound(from, page_.offset.end(), static_cast<double>(offset));
  at_ = static_cast<size_t>(found - page_.offset.begin()) - 1;
}

Status HostLookup::find(Range range, uint64_t limit, const CancelFlag& cancel, const Use& use) {
  if (fd_ < 0) {
    use(range, HostState::unknown, 0);
    return {};
  }
  limit = std::max(limit, range.end());
  for (uint64_t at = range.offset; at < range.end();) {
    if (at < start_ || at >= end_) {
      // What lies elsewhere than the last look is asked for alone: each extent more costs the
      // kernel as much again.
      Status status = load(at, at == end_ ? limit : range.end(), cancel);
      if (!status.ok()) return status;
      if (cancel.isSet()) return {};
    }
    seek(at);
    const auto end = static_cast<uint64_t>(page_.offset[at_] + page_.length[at_]);
    const uint64_t stop = std::min(end, range.end());
    const Range part{at, stop - at};
    if (!use(part, static_cast<HostState>(page_.state[at_]), page_.flags[at_])) return {};
    at = stop;
  }
  return {};
}

Status HostLookup::addLacking(Range range, uint64_t limit, const CancelFlag& cancel,
                              Lacking* lacking) {
  return find(range, limit, cancel, [lacking](Range part, HostState state, uint32_t) {
    lacking->add(state, part.length);
    return true;
  });
}

Outcome readJoined(const Image& image, const HostFiles& files, Range range, size_t maxExtents,
                   const CancelFlag& cancel, JoinedPage* page) {
  FileIo io(files.fd);
  MapReader reader(io, image);
  reader.setBatch(std::max(kTableBatch, image.geometry.clusterSize()));
  MapPage guest;
  Outcome outcome = reader.read(range, maxExtents, cancel, &guest);
  page->next = range.offset;
  page->cancelled = guest.cancelled;
  if (!outcome.ok() || guest.cancelled) return outcome;
  page->next = guest.next;
  Join join(image, files, maxExtents, cancel);
  return Outcome::of(join.run(guest, page));
}

}  // namespace thicken::qcow2
