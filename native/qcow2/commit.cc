#include <algorithm>

#include "allocate.h"
#include "bytes.h"

namespace thicken::qcow2 {
namespace {

constexpr size_t kFreedAtOnce = 4096;
// One call, between which cancelling is polled.
constexpr uint64_t kReservePiece = 16ull << 30;
constexpr uint64_t kKnownAutoclear = kBitmapsBit | kRawDataBit;

}  // namespace

// Bits that are not known may vouch for something that allocation makes untrue. What the known ones
// vouch for, the content of the virtual disk and of a raw data file, does not change.
Outcome Allocator::clearAutoclear() {
  const uint64_t kept = image_.header.autoclear & kKnownAutoclear;
  if (kept == image_.header.autoclear) return {};
  uint8_t field[8];
  store64(field, kept);
  Status status = file_.write(Range{kAutoclearField, sizeof field}, field);
  if (status.ok()) status = file_.sync();
  if (status.ok()) image_.header.autoclear = kept;
  return Outcome::of(status);
}

// The first time for all of the request, so that it happens once.
Outcome Allocator::growTable(uint64_t fresh) {
  const Geometry& geometry = image_.geometry;
  if (!grown_)
    fresh = std::max(fresh, needed_.data - needed_.reused + needed_.tables) + laterClusters();
  const Growth growth = planGrowth(geometry, next_, fresh, image_.refcountTable.size(), hasBlock());
  grown_ = true;
  if (growth.table == 0) return {};
  const ClusterRun old{image_.header.refcountTableOffset >> geometry.clusterBits,
                       image_.header.refcountTableClusters};
  const ClusterRun area{next_, growth.blocks + growth.table};
  const ClusterRun table{next_ + growth.blocks, growth.table};
  failed_ = true;
  Outcome outcome = extend(bytes(area.end()));
  const uint64_t entries = geometry.blockEntries();
  uint64_t place = area.first;
  for (uint64_t index = area.first / entries; index <= (area.end() - 1) / entries; index++)
    if (!counts_.hasBlock(index)) counts_.addBlock(index, place++);
  if (outcome.ok()) outcome = counts_.setRun(ClusterRun{area.first, place - area.first}, 1);
  if (outcome.ok()) outcome = counts_.setRun(table, 1);
  if (outcome.ok()) outcome = counts_.writeBlocks();
  if (outcome.ok()) outcome = counts_.moveTable(table);
  for (uint64_t i = old.first; outcome.ok() && i < old.end(); i++) outcome = lower(i, 1);
  if (outcome.ok()) outcome = counts_.writeBlocks();
  if (!outcome.ok()) return outcome;
  next_ = area.end();
  noteBeside(area.count);
  failed_ = false;
  return {};
}

Outcome Allocator::lower(uint64_t cluster, uint64_t by) {
  uint64_t count = 0;
  Outcome outcome = counts_.get(cluster, &count);
  if (!outcome.ok()) return outcome;
  if (count < by)
    return Outcome::refused(Code::corrupt, "a cluster in use has no reference count",
                            Range{bytes(cluster), bytes(1)});
  return counts_.set(cluster, count - by);
}

// The order is what makes a crash at any moment harmless: whatever is referred to is on the disk,
// and counted there, before what refers to it is written. Nothing refers to new tables before L1
// does: they can go to the disk together with the counts.
Outcome Allocator::commit(Chunk* chunk, const Choice& choice) {
  chunk->assign(choice.supply);
  const bool together = !chunk->changesInPlace();
  Outcome outcome;
  if (together) outcome = writeTables(chunk);
  if (outcome.ok()) outcome = countClusters(choice);
  if (outcome.ok() && !together) outcome = writeTables(chunk);
  if (outcome.ok() && !together) outcome = Outcome::of(file_.sync());
  if (outcome.ok()) outcome = writeL1(chunk);
  if (outcome.ok()) outcome = releaseOld(*chunk);
  return outcome;
}

Outcome Allocator::countClusters(const Choice& choice) {
  // A new block counts itself, or its entry would be an error for as long as its count is not
  // written.
  for (const ClusterRun& block : choice.blocks) counts_.addBlock(block.first, block.count);
  Outcome outcome;
  if (choice.area.count > 0) outcome = counts_.setRun(choice.area, 1);
  if (outcome.ok()) outcome = counts_.writeBlocks();
  if (outcome.ok()) outcome = Outcome::of(file_.sync());
  if (outcome.ok() && counts_.hasNewBlocks()) {
    outcome = counts_.writeEntries();
    if (outcome.ok()) outcome = Outcome::of(file_.sync());
  }
  if (!outcome.ok()) return outcome;
  next_ = choice.area.end();
  noteBeside(choice.area.count - choice.fresh);
  for (const ClusterRun& used : choice.leaks) {
    ClusterRun& leak = survey_.leaks[leak_];
    leak.first += used.count;
    leak.count -= used.count;
    if (leak.count == 0) leak_++;
  }
  return {};
}

// Neighbours in the file are neighbours in memory, and go together.
Outcome Allocator::writeTables(Chunk* chunk) {
  const uint64_t size = image_.geometry.clusterSize();
  const uint64_t entrySize = image_.geometry.entrySize();
  std::vector<ChunkTable>& tables = chunk->tables();
  for (size_t i = 0; i < tables.size();) {
    const ChunkTable& first = tables[i];
    size_t next = i + 1;
    if (!first.changed) {
      i = next;
      continue;
    }
    Range part{0, size};
    if (first.owned)
      part = Range{first.dirtyFirst * entrySize, (first.dirtyEnd - first.dirtyFirst) * entrySize};
    while (!first.owned && next < tables.size() && tables[next].changed && !tables[next].owned &&
           tables[next].place == first.place + (next - i))
      next++;
    part.length += (next - i - 1) * size;
    const Range place{bytes(first.place) + part.offset, part.length};
    Status status = file_.write(place, chunk->bytesOf(i) + part.offset);
    if (!status.ok()) return Outcome::of(status);
    i = next;
  }
  return {};
}

Outcome Allocator::writeL1(Chunk* chunk) {
  uint64_t first = ~0ull;
  uint64_t end = 0;
  for (const ChunkTable& table : chunk->tables()) {
    if (!table.changed || table.owned) continue;
    image_.l1[table.l1Index] = kCopied | bytes(table.place);
    first = std::min(first, table.l1Index);
    end = table.l1Index + 1;
  }
  if (end == 0) return {};
  std::vector<uint64_t> words(image_.l1.begin() + static_cast<ptrdiff_t>(first),
                              image_.l1.begin() + static_cast<ptrdiff_t>(end));
  for (uint64_t& word : words) word = htobe64(word);
  const Range place{image_.header.l1Offset + first * 8, words.size() * 8};
  Status status = file_.write(place, words.data());
  if (status.ok()) status = file_.sync();
  return Outcome::of(status);
}

// The snapshots keep the tables that were copied, and the clusters that were marked as zeros.
Outcome Allocator::releaseOld(const Chunk& chunk) {
  Outcome outcome;
  bool any = !chunk.replaced().empty();
  for (const ChunkTable& table : chunk.tables()) {
    if (!table.changed || table.owned || table.oldCluster == 0 || !outcome.ok()) continue;
    outcome = release(table.oldCluster);
    any = true;
  }
  for (const uint64_t cluster : chunk.replaced())
    if (outcome.ok()) outcome = release(cluster);
  return any && outcome.ok() ? counts_.writeBlocks() : outcome;
}

// One reference less; none is left of those whose count was too high.
Outcome Allocator::release(uint64_t cluster) {
  const std::vector<Excess>& known = survey_.flagless;
  const auto found = std::lower_bound(
      known.begin(), known.end(), cluster,
      [](const Excess& excess, uint64_t wanted) { return excess.cluster < wanted; });
  const bool isKnown = found != known.end() && found->cluster == cluster;
  return lower(cluster, isKnown ? 1 + found->surplus : 1);
}

Outcome Allocator::freeLeaks(Progress* progress) {
  Outcome outcome = checkSizes();
  size_t pending = 0;
  const auto flush = [&] {
    if (!outcome.ok() || ++pending % kFreedAtOnce != 0) return;
    outcome = counts_.writeBlocks();
    counts_.trim();
    progress->disturbed = isDisturbed();
    if (outcome.ok()) outcome = checkSizes();
  };
  progress->disturbed = isDisturbed();
  const auto goesOn = [&] { return outcome.ok() && !progress->disturbed; };
  for (; goesOn() && leak_ < survey_.leaks.size(); leak_++) {
    outcome = counts_.setRun(survey_.leaks[leak_], 0);
    flush();
  }
  for (size_t i = 0; goesOn() && i < survey_.excess.size(); i++) {
    outcome = lower(survey_.excess[i].cluster, survey_.excess[i].surplus);
    flush();
  }
  if (goesOn()) survey_.excess.clear();
  return outcome.ok() ? counts_.writeBlocks() : outcome;
}

// Behind the last cluster, without a gap: QEMU looks for as many in a row as a write needs.
Outcome Allocator::addBlocks(const CancelFlag& cancel, Progress* progress) {
  const uint64_t entries = image_.geometry.blockEntries();
  const uint64_t end = image_.geometry.clustersFor(image_.fileSize) + needed_.reserve;
  const uint64_t last = (end + blocksWithin(end, entries, hasBlock()) - 1) / entries;
  std::deque<uint64_t> missing;
  for (uint64_t index = 0; index <= last; index++)
    if (!counts_.hasBlock(index)) missing.push_back(index);
  Outcome outcome;
  while (outcome.ok() && !stops(cancel, progress)) {
    const std::vector<ClusterRun> blocks = nextBlocks(&missing);
    if (blocks.empty()) break;
    outcome = addBlockRun(blocks);
  }
  return outcome;
}

// Of those that are missing, as many as another block counts that is on the disk. Where none does,
// the block comes first that will: it counts itself.
std::vector<ClusterRun> Allocator::nextBlocks(std::deque<uint64_t>* missing) const {
  const uint64_t entries = image_.geometry.blockEntries();
  std::vector<ClusterRun> blocks;
  for (;;) {
    while (!missing->empty() && counts_.hasBlock(missing->front())) missing->pop_front();
    if (missing->empty()) return blocks;
    const uint64_t place = next_ + blocks.size();
    if (!counts_.hasBlock(place / entries)) {
      if (blocks.empty()) blocks.push_back(ClusterRun{place / entries, place});
      return blocks;
    }
    blocks.push_back(ClusterRun{missing->front(), place});
    missing->pop_front();
  }
}

// Each lies where another is on the disk that counts it, or is alone, and counts itself.
Outcome Allocator::addBlockRun(const std::vector<ClusterRun>& blocks) {
  const ClusterRun area{next_, blocks.size()};
  Outcome outcome = checkSizes();
  if (outcome.ok()) outcome = clearAutoclear();
  if (outcome.ok()) outcome = extend(bytes(area.end()));
  for (const ClusterRun& block : blocks) counts_.addBlock(block.first, block.count);
  if (outcome.ok()) outcome = counts_.setRun(area, 1);
  if (outcome.ok()) outcome = counts_.writeBlocks();
  if (outcome.ok()) outcome = Outcome::of(file_.sync());
  if (outcome.ok()) outcome = counts_.writeEntries();
  if (outcome.ok()) outcome = Outcome::of(file_.sync());
  next_ = area.end();
  counts_.trim();
  return outcome;
}

// QEMU takes the first free clusters that fit, those within the file before those behind its end:
// all of them get blocks.
Outcome Allocator::reserveFree(const CancelFlag& cancel, Progress* progress) {
  const uint64_t end = image_.geometry.clustersFor(image_.fileSize) + needed_.reserve;
  return eachFree(end, cancel, [&](ClusterRun run) {
    Outcome outcome;
    for (uint64_t at = bytes(run.first);
         outcome.ok() && at < bytes(run.end()) && !stops(cancel, progress); at += kReservePiece) {
      const Range piece{at, std::min(kReservePiece, bytes(run.end()) - at)};
      outcome = reserve(file_, piece, true, progress);
    }
    return outcome;
  });
}

Outcome Allocator::provideLater(const CancelFlag& cancel, Progress* progress) {
  Outcome outcome;
  const bool later = needed_.reserve > 0 && !stops(cancel, progress);
  if (later && !grown_) outcome = growTable(0);
  failed_ = true;
  if (outcome.ok() && later) outcome = addBlocks(cancel, progress);
  if (outcome.ok()) outcome = provideTables(cancel, progress);
  if (outcome.ok() && needed_.reserve > 0) outcome = reserveFree(cancel, progress);
  progress->cancelled = cancel.isSet();
  return outcome;
}

Outcome Allocator::finish(const CancelFlag& cancel, Progress* progress) {
  *progress = Progress{};
  if (failed_ || rules_ == nullptr)
    return Outcome::refused(Code::stale, "an earlier call failed; open the image again");
  failed_ = true;
  Outcome outcome = freeLeaks(progress);
  if (outcome.ok() && !progress->disturbed) outcome = provideLater(cancel, progress);
  if (!outcome.ok() || progress->disturbed) return outcome;
  outcome = Outcome::of(file_.sync());
  if (outcome.ok() && dataFile_ != nullptr) outcome = Outcome::of(dataFile_->sync());
  failed_ = !outcome.ok();
  return outcome;
}

}  // namespace thicken::qcow2
