#include "allocate.h"

#include <algorithm>
#include <utility>

#include "../zero.h"
#include "references.h"

namespace thicken::qcow2 {
namespace {

// Zeros are written in pieces of this size, between which cancelling is polled.
constexpr uint64_t kZeroPiece = 8u << 20;

}  // namespace

Allocator::Allocator(Io& file, Io* dataFile, Image image)
    : file_(file), dataFile_(dataFile), image_(std::move(image)), counts_(file_, image_) {}

HasBlock Allocator::hasBlock() const {
  return [this](uint64_t index) { return counts_.hasBlock(index); };
}

Outcome Allocator::prepare(const Request& request, const CancelFlag& cancel, bool* cancelled) {
  *cancelled = false;
  request_ = request;
  rules_ = std::make_unique<Rules>(image_, request_);
  needed_ = Needed{};
  counts_.reset();
  leak_ = 0;
  grown_ = false;
  failed_ = true;
  dataSize_ = 0;
  Outcome outcome = checkWritable(image_.header);
  if (outcome.ok()) outcome = checkSizes();
  if (outcome.ok()) outcome = surveyImage(file_, image_, cancel, &survey_);
  Demand demand;
  if (outcome.ok() && !survey_.cancelled)
    outcome = measureDemand(file_, image_, *rules_, &counts_, cancel, &demand);
  uint64_t bitmaps = 0;
  if (outcome.ok()) outcome = measureBitmaps(file_, image_, &bitmaps);
  if (request_.level != Level::metadata && rules_->clusters().count > 0)
    needed_.reserve = demand.moving + bitmaps;
  *cancelled = survey_.cancelled || demand.cancelled;
  if (outcome.ok() && !*cancelled) outcome = checkRequest(demand);
  if (!outcome.ok() || *cancelled) return outcome;
  zeroFrom_ = image_.geometry.clustersFor(image_.fileSize);
  // What lies in the file behind the last counted cluster is free, unless it is something unknown.
  next_ = image_.header.allKnown ? survey_.end : std::max(survey_.end, zeroFrom_);
  outcome = planNeeded(demand, cancel);
  *cancelled = cancel.isSet();
  failed_ = !outcome.ok();
  return outcome;
}

Outcome Allocator::checkRequest(const Demand& demand) const {
  const Geometry& geometry = image_.geometry;
  if (demand.backed)
    return Outcome::refused(Code::needsPopulate, "content of the range comes from the backing file",
                            Range{demand.firstBacked, geometry.clusterSize()});
  if (geometry.externalData && request_.level != Level::metadata && dataFile_ == nullptr)
    return Outcome::refused(Code::unsupported, "the external data file is not open");
  if (geometry.version < 3 && image_.header.cryptMethod != 0 && demand.data > 0)
    return Outcome::refused(Code::unsupported,
                            "encrypted images of version 2 can't say that a cluster is zero; "
                            "`qemu-img amend -o compat=1.1` makes it version 3");
  return {};
}

Outcome Allocator::planNeeded(const Demand& demand, const CancelFlag& cancel) {
  const Geometry& geometry = image_.geometry;
  uint64_t leaked = 0;
  for (const ClusterRun& run : survey_.leaks) leaked += run.count;
  needed_.counted = survey_.counted;
  needed_.data = geometry.externalData ? 0 : demand.data;
  needed_.tables = demand.tables;
  Outcome outcome = planCopies(cancel);
  if (!outcome.ok()) return outcome;
  // To a QEMU they are in use.
  needed_.reused = std::min(leaked, needed_.data - copiedClusters());
  const uint64_t fresh = needed_.data - needed_.reused + needed_.tables - inside_;
  if (fresh > kMaxHostEnd >> geometry.clusterBits)
    return Outcome::refused(Code::unsupported, "the file would be larger than qcow2 can be");
  const Growth growth =
      planGrowth(geometry, next_, fresh + laterClusters(), image_.refcountTable.size(), hasBlock());
  const uint64_t start = next_ + growth.blocks + growth.table;
  const auto hasThen = [this, start](uint64_t index) {
    const uint64_t entries = image_.geometry.blockEntries();
    return counts_.hasBlock(index) ||
           (start > next_ && index >= next_ / entries && index <= (start - 1) / entries);
  };
  const uint64_t end = layoutEnd(start, fresh, geometry.blockEntries(), hasThen);
  if (bytes(growth.table) > kMaxRefcountTableBytes || end > kMaxHostEnd >> geometry.clusterBits)
    return Outcome::refused(Code::unsupported,
                            "the file would need a refcount table beyond the 8 MiB that QEMU "
                            "opens; convert the image to a larger cluster size");
  needed_.refcounts = growth.blocks + growth.table + (end - start - fresh);
  beside_ = needed_.tables + needed_.refcounts;
  needed_.freed = growth.table == 0 ? 0 : image_.header.refcountTableClusters;
  needed_.fileEnd = std::max(image_.fileSize, bytes(end));
  needed_.area = ClusterRun{next_, end - next_};
  needed_.mixed = demand.mixed;
  if (rules_->plain()) needed_.marked = demand.fills + demand.mixed;
  if (rules_->plain()) needed_.bare = demand.data;
  const bool zeroes = geometry.version < 3 || rules_->plain();
  if (zeroes && geometry.externalData) needed_.stale = demand.fills + demand.data;
  if (zeroes && !geometry.externalData)
    needed_.stale =
        demand.fills + needed_.reused + std::min(zeroFrom_, end) - std::min(zeroFrom_, next_);
  planBlocks();
  return {};
}

// With a block for each count, QEMU takes no more clusters than it needs. Where one is missing, it
// passes over what it has found by then, as much as one write takes, and a table that is outgrown
// goes far behind the end (alloc_refcount_block, 7.2).
void Allocator::planBlocks() {
  if (needed_.reserve == 0) return;
  const uint64_t entries = image_.geometry.blockEntries();
  const uint64_t end = image_.geometry.clustersFor(needed_.fileEnd);
  const ClusterRun area = needed_.area;
  const auto hasThen = [this, entries, area](uint64_t index) {
    const bool inArea =
        area.count > 0 && index >= area.first / entries && index <= (area.end() - 1) / entries;
    return inArea || counts_.hasBlock(index);
  };
  needed_.blocks = blocksWithin(end + needed_.reserve, entries, hasThen);
  // Behind what leaked far off, they take blocks for themselves.
  const uint64_t place = area.count > 0 ? area.end() : next_;
  if (place > end + needed_.reserve + needed_.blocks)
    needed_.blocks = layoutEnd(place, needed_.blocks, entries, hasThen) - place;
  const uint64_t used = survey_.counted + needed_.total() - needed_.freed;
  needed_.free = end > used ? end - used : 0;
}

// What the refcount table is to have room for besides the request.
uint64_t Allocator::laterClusters() const {
  if (needed_.reserve == 0) return 0;
  const uint64_t end = image_.geometry.clustersFor(image_.fileSize);
  const uint64_t tail = end > next_ ? end - next_ : 0;
  return tail + needed_.reserve + blocksWithin(next_, image_.geometry.blockEntries(), hasBlock());
}

uint64_t Allocator::reserveInUse() const {
  // One write takes as many as a slice of a table has entries, of 4 KiB unless QEMU is told
  // otherwise.
  constexpr uint64_t kSlice = 512;
  if (needed_.reserve == 0) return 0;
  const Geometry& geometry = image_.geometry;
  const uint64_t passedOver = std::min(kSlice, geometry.tableEntries());
  const uint64_t table = needed_.freed == 0 ? 0 : geometry.blockEntries() + 2 * needed_.refcounts;
  return needed_.reserve + 2 + needed_.blocks * (1 + passedOver) + table;
}

Outcome Allocator::allocate(Range piece, const CancelFlag& cancel, Progress* progress) {
  *progress = Progress{};
  progress->next = piece.offset;
  progress->beside = bytes(beside_);
  if (failed_ || rules_ == nullptr)
    return Outcome::refused(Code::stale, "an earlier call failed; open the image again");
  Outcome outcome = poll(cancel, progress);
  if (!outcome.ok() || progress->stopped()) return outcome;
  const Geometry& geometry = image_.geometry;
  Request part = request_;
  part.range = piece;
  const ClusterRun clusters = Rules(image_, part).clusters();
  if (clusters.count == 0) {
    progress->next = std::max(piece.offset, geometry.clippedEnd(piece.offset, piece.length));
    return {};
  }
  Chunk chunk(image_, request_, *rules_);
  outcome = chunk.load(file_, clusters, &counts_);
  const bool writes = chunk.hasChanges() || !chunk.zeroRanges().empty();
  if (outcome.ok() && writes) outcome = clearAutoclear();
  if (outcome.ok() && chunk.hasChanges())
    outcome = growTable(chunk.dataNeeded() + chunk.tablesNeeded());
  if (!outcome.ok()) return outcome;
  const Choice choice = choose(&chunk);
  outcome = provide(&chunk, choice, cancel, progress);
  if (outcome.ok() && !progress->stopped()) outcome = checkSizes();
  if (!outcome.ok() || progress->stopped()) return outcome;
  failed_ = true;
  if (chunk.hasChanges()) outcome = commit(&chunk, choice);
  if (!outcome.ok()) return outcome;
  failed_ = false;
  counts_.trim();
  progress->beside = bytes(beside_);
  progress->mapped = chunk.mappedClusters() << geometry.clusterBits;
  progress->next = std::min(chunk.clusters().end() << geometry.clusterBits, geometry.virtualSize);
  return {};
}

Allocator::Choice Allocator::choose(Chunk* chunk) {
  Choice choice;
  uint64_t data = chunk->dataNeeded();
  for (size_t i = leak_; data > 0 && i < survey_.leaks.size(); i++) {
    const ClusterRun& leak = survey_.leaks[i];
    const ClusterRun run{leak.first, std::min(data, leak.count)};
    choice.leaks.push_back(run);
    choice.supply.push_back(Supply{run, false});
    data -= run.count;
  }
  Layout layout(next_, data + chunk->tablesNeeded(), image_.geometry.blockEntries(), hasBlock());
  choice.area = layout.area();
  choice.fresh = data;
  choice.blocks = layout.blocks();
  while (data > 0) {
    // Clusters that were in the file before may hold anything.
    const uint64_t at = layout.peek();
    const bool zero = at >= zeroFrom_;
    const ClusterRun run = layout.take(zero ? data : std::min(data, zeroFrom_ - at));
    choice.supply.push_back(Supply{run, zero});
    data -= run.count;
  }
  for (ChunkTable& table : chunk->tables())
    if (table.changed) table.place = table.owned ? table.oldCluster : layout.take(1).first;
  const bool flagged = image_.geometry.version >= 3 && !rules_->plain();
  for (const Supply& supply : choice.supply)
    if (request_.level == Level::full || (!supply.zero && !flagged))
      chunk->addZeroRange(Range{bytes(supply.clusters.first), bytes(supply.clusters.count)});
  return choice;
}

Outcome Allocator::reserve(Io& io, Range range, bool keepSize, Progress* progress) {
  Status status = io.reserve(range, keepSize);
  if (status.error != EOPNOTSUPP) return Outcome::of(status);
  progress->reserved = false;
  return {};
}

Outcome Allocator::extend(uint64_t end) {
  Outcome outcome;
  if (end > image_.fileSize)
    outcome = Outcome::of(file_.writeZeros(Range{end - kSectorSize, kSectorSize}));
  if (outcome.ok()) image_.fileSize = std::max(image_.fileSize, end);
  return outcome;
}

// A raw data file is a disk by itself. Where the tables know nothing of its content (QEMU
// before 6.1 made them so over a full one), it is the content that counts.
Outcome Allocator::checkRaw(Range piece) {
  if ((image_.header.autoclear & kRawDataBit) == 0) return {};
  std::vector<char> content(piece.length);
  Outcome outcome = Outcome::of(readPadded(*dataFile_, piece, content.data()));
  if (!outcome.ok() || isZero(content.data(), content.size())) return outcome;
  return Outcome::refused(
      Code::corrupt,
      "the raw data file has content where the tables say zeros: one of them is "
      "not the image's; allocate the data file by itself, with --format raw",
      piece);
}

bool Allocator::isDisturbed() {
  return file_.disturbed() || (dataFile_ != nullptr && dataFile_->disturbed());
}

// Asked between bounded pieces: what was proven of the files may be no more.
bool Allocator::stops(const CancelFlag& cancel, Progress* progress) {
  progress->cancelled = cancel.isSet();
  progress->disturbed = isDisturbed();
  return progress->stopped();
}

// To cut a file off by its name needs no open. What was there is gone, and a write grows it again.
Outcome Allocator::checkSizes() {
  uint64_t size = 0;
  uint64_t dataSize = 0;
  Status status = file_.size(&size);
  if (status.ok() && dataFile_ != nullptr) status = dataFile_->size(&dataSize);
  if (!status.ok()) return Outcome::of(status);
  if (size < image_.fileSize || dataSize < dataSize_)
    return Outcome::refused(Code::stale, "a file of the image has become shorter");
  dataSize_ = dataSize;
  return {};
}

// Comes before each bounded piece of work.
Outcome Allocator::poll(const CancelFlag& cancel, Progress* progress) {
  return stops(cancel, progress) ? Outcome{} : checkSizes();
}

// `write`: also to what reads as zeros already.
Outcome Allocator::fillRange(Io& io, Range range, bool write, const CancelFlag& cancel,
                             Progress* progress) {
  for (uint64_t at = range.offset; at < range.end(); at += kZeroPiece) {
    Outcome outcome = poll(cancel, progress);
    if (!outcome.ok() || progress->stopped()) return outcome;
    const Range piece{at, std::min(kZeroPiece, range.end() - at)};
    outcome = checkRaw(piece);
    if (!outcome.ok()) return outcome;
    Status status = write ? io.writeZeros(piece) : io.clear(piece);
    if (!status.ok()) return Outcome::of(status);
  }
  return {};
}

// The last cluster of a data file may reach behind the virtual disk, where a disk that is made
// larger finds what lies there. Of a raw data file that is the disk's own, as its readers see it.
Outcome Allocator::fillZeros(const std::vector<Range>& ranges, bool write, const CancelFlag& cancel,
                             Progress* progress) {
  const bool external = image_.geometry.externalData;
  const bool raw = (image_.header.autoclear & kRawDataBit) != 0;
  Io* io = external ? dataFile_ : &file_;
  Outcome outcome;
  for (const Range& range : ranges) {
    const uint64_t diskEnd = external ? image_.geometry.virtualSize : range.end();
    const uint64_t end = std::clamp(diskEnd, range.offset, range.end());
    const Range behind{end, range.end() - end};
    if (outcome.ok())
      outcome = fillRange(*io, Range{range.offset, end - range.offset}, write, cancel, progress);
    if (outcome.ok() && !raw) outcome = fillRange(*io, behind, false, cancel, progress);
  }
  // What was opened meanwhile is looked at before it is mapped.
  if (!outcome.ok() || ranges.empty() || stops(cancel, progress)) return outcome;
  // The tables, which are to say that this is data, lie in another file.
  return external ? Outcome::of(dataFile_->sync()) : Outcome{};
}

// Space for all that the chunk will refer to. Nothing refers to it yet.
Outcome Allocator::provide(Chunk* chunk, const Choice& choice, const CancelFlag& cancel,
                           Progress* progress) {
  const bool metadata = request_.level == Level::metadata;
  const Range area{bytes(choice.area.first), bytes(choice.area.count)};
  uint64_t end = choice.area.count == 0 ? 0 : area.end();
  Outcome outcome;
  for (const ClusterRun& leak : choice.leaks) {
    end = std::max(end, bytes(leak.end()));
    if (outcome.ok() && !metadata)
      outcome = reserve(file_, Range{bytes(leak.first), bytes(leak.count)}, true, progress);
  }
  if (outcome.ok() && !metadata && area.length > 0) outcome = reserve(file_, area, false, progress);
  if (outcome.ok()) outcome = extend(end);
  const bool hasReserved = progress->reserved;
  if (outcome.ok() && !metadata) outcome = provideMapped(chunk, progress);
  const bool full = request_.level == Level::full;
  if (outcome.ok()) outcome = fillZeros(chunk->zeroRanges(), full, cancel, progress);
  if (hasReserved || !outcome.ok() || progress->stopped() || full || request_.zerosFollow)
    return outcome;
  // Without fallocate(2), new clusters get their blocks by being written.
  std::vector<Range> fresh;
  for (const Supply& supply : choice.supply)
    fresh.push_back(Range{bytes(supply.clusters.first), bytes(supply.clusters.count)});
  return fillZeros(fresh, true, cancel, progress);
}

Outcome Allocator::provideMapped(Chunk* chunk, Progress* progress) {
  const Geometry& geometry = image_.geometry;
  if (geometry.externalData) {
    const uint64_t start = chunk->clusters().first << geometry.clusterBits;
    const uint64_t end =
        std::min(chunk->clusters().end() << geometry.clusterBits, geometry.virtualSize);
    return reserve(*dataFile_, Range{start, end - start}, false, progress);
  }
  for (const ClusterRun& run : chunk->takeMapped()) {
    Outcome outcome = reserve(file_, Range{bytes(run.first), bytes(run.count)}, true, progress);
    if (!outcome.ok()) return outcome;
  }
  return {};
}

}  // namespace thicken::qcow2
