#include "refcounts.h"

#include <algorithm>

#include "bytes.h"

namespace thicken::qcow2 {
namespace {

constexpr size_t kKeptBytes = 4u << 20;

}  // namespace

uint64_t getCount(const uint8_t* block, uint32_t order, uint64_t index) {
  switch (order) {
    case 3:
      return block[index];
    case 4:
      return load16(block + index * 2);
    case 5:
      return load32(block + index * 4);
    case 6:
      return load64(block + index * 8);
    default: {
      const uint32_t width = 1u << order;
      const uint64_t bit = index << order;
      return block[bit / 8] >> (bit % 8) & ((1u << width) - 1);
    }
  }
}

void setCount(uint8_t* block, uint32_t order, uint64_t index, uint64_t count) {
  switch (order) {
    case 3:
      block[index] = static_cast<uint8_t>(count);
      return;
    case 4: {
      const uint16_t value = htobe16(static_cast<uint16_t>(count));
      std::memcpy(block + index * 2, &value, sizeof value);
      return;
    }
    case 5:
      store32(block + index * 4, static_cast<uint32_t>(count));
      return;
    case 6:
      store64(block + index * 8, count);
      return;
    default: {
      const uint32_t mask = (1u << (1u << order)) - 1;
      const uint64_t bit = index << order;
      const uint32_t shift = bit % 8;
      const uint32_t others = block[bit / 8] & ~(mask << shift);
      block[bit / 8] =
          static_cast<uint8_t>(others | (static_cast<uint32_t>(count) & mask) << shift);
    }
  }
}

namespace {

// A run of counts: the first, and then what is there already, as often as it takes.
void setCounts(uint8_t* block, uint32_t order, uint64_t first, uint64_t end, uint64_t count) {
  constexpr uint32_t kOneByte = 3;
  if (order < kOneByte) {
    for (uint64_t i = first; i < end; i++) setCount(block, order, i, count);
    return;
  }
  const uint64_t width = 1ull << (order - kOneByte);
  uint8_t* const start = block + first * width;
  const uint64_t length = (end - first) * width;
  setCount(start, order, 0, count);
  for (uint64_t done = width; done < length; done *= 2)
    std::memcpy(start + done, start, std::min(done, length - done));
}

}  // namespace

Outcome Refcounts::load(uint64_t blockIndex, Block** block) {
  const auto found = blocks_.find(blockIndex);
  if (found != blocks_.end()) {
    *block = &found->second;
    return {};
  }
  if (!hasBlock(blockIndex))
    return Outcome::refused(Code::corrupt, "a cluster in use has no reference count");
  Block fresh;
  fresh.bytes.resize(image_.geometry.clusterSize());
  const Range place{image_.refcountTable[blockIndex], fresh.bytes.size()};
  Status status = readPadded(io_, place, fresh.bytes.data());
  if (!status.ok()) return Outcome::of(status);
  *block = &(blocks_[blockIndex] = std::move(fresh));
  return {};
}

Outcome Refcounts::get(uint64_t cluster, uint64_t* count) {
  *count = 0;
  const uint64_t entries = image_.geometry.blockEntries();
  if (!hasBlock(cluster / entries) && blocks_.count(cluster / entries) == 0) return {};
  Block* block = nullptr;
  Outcome outcome = load(cluster / entries, &block);
  if (outcome.ok())
    *count = getCount(block->bytes.data(), image_.geometry.refcountOrder, cluster % entries);
  return outcome;
}

void Refcounts::mark(Block* block, uint64_t from, uint64_t end) {
  block->dirtyFrom = std::min(block->dirtyFrom, from);
  block->dirtyEnd = std::max(block->dirtyEnd, end);
}

Outcome Refcounts::set(uint64_t cluster, uint64_t count) {
  return setRun(ClusterRun{cluster, 1}, count);
}

Outcome Refcounts::setRun(ClusterRun run, uint64_t count) {
  const Geometry& geometry = image_.geometry;
  const uint64_t entries = geometry.blockEntries();
  for (uint64_t at = run.first; at < run.end();) {
    Block* block = nullptr;
    Outcome outcome = load(at / entries, &block);
    if (!outcome.ok()) return outcome;
    const uint64_t first = at % entries;
    const uint64_t last = std::min(first + (run.end() - at), entries) - 1;
    setCounts(block->bytes.data(), geometry.refcountOrder, first, last + 1, count);
    if (block->dirtyEnd == 0) dirty_.push_back(at / entries);
    mark(block, (first << geometry.refcountOrder) / 8,
         (((last + 1) << geometry.refcountOrder) + 7) / 8);
    at += last - first + 1;
  }
  return {};
}

void Refcounts::addBlock(uint64_t blockIndex, uint64_t cluster) {
  Block block;
  block.bytes.resize(image_.geometry.clusterSize());
  mark(&block, 0, block.bytes.size());
  blocks_[blockIndex] = std::move(block);
  dirty_.push_back(blockIndex);
  added_.push_back(ClusterRun{blockIndex, cluster});
}

Outcome Refcounts::writeBlocks() {
  std::map<uint64_t, uint64_t> fresh;
  for (const ClusterRun& added : added_) fresh[added.first] = added.count;
  std::sort(dirty_.begin(), dirty_.end());
  for (const uint64_t index : dirty_) {
    Block& block = blocks_[index];
    const auto added = fresh.find(index);
    const uint64_t place = added == fresh.end() ? image_.refcountTable[index]
                                                : added->second << image_.geometry.clusterBits;
    const Range bytes{place + block.dirtyFrom, block.dirtyEnd - block.dirtyFrom};
    Status status = io_.write(bytes, block.bytes.data() + block.dirtyFrom);
    if (!status.ok()) return Outcome::of(status);
    block.dirtyFrom = ~0ull;
    block.dirtyEnd = 0;
  }
  dirty_.clear();
  return {};
}

Outcome Refcounts::writeEntries() {
  if (added_.empty()) return {};
  uint64_t first = ~0ull;
  uint64_t last = 0;
  for (const ClusterRun& added : added_) {
    if (added.first >= image_.refcountTable.size())
      return Outcome::refused(Code::stale, "the refcount table has no room for a block");
    image_.refcountTable[added.first] = added.count << image_.geometry.clusterBits;
    first = std::min(first, added.first);
    last = std::max(last, added.first);
  }
  added_.clear();
  std::vector<uint64_t> words(image_.refcountTable.begin() + static_cast<ptrdiff_t>(first),
                              image_.refcountTable.begin() + static_cast<ptrdiff_t>(last + 1));
  for (uint64_t& word : words) word = htobe64(word);
  const uint64_t place = image_.header.refcountTableOffset + first * 8;
  return Outcome::of(io_.write(Range{place, words.size() * 8}, words.data()));
}

Outcome Refcounts::moveTable(ClusterRun place) {
  const Geometry& geometry = image_.geometry;
  image_.refcountTable.resize((place.count << geometry.clusterBits) / 8);
  for (const ClusterRun& added : added_)
    image_.refcountTable[added.first] = added.count << geometry.clusterBits;
  added_.clear();
  std::vector<uint64_t> words = image_.refcountTable;
  for (uint64_t& word : words) word = htobe64(word);
  const uint64_t offset = place.first << geometry.clusterBits;
  Status status = io_.write(Range{offset, words.size() * 8}, words.data());
  if (status.ok()) status = io_.sync();
  if (!status.ok()) return Outcome::of(status);
  // Both fields lie in one sector, and change together.
  uint8_t fields[12];
  store64(fields, offset);
  store32(fields + 8, static_cast<uint32_t>(place.count));
  status = io_.write(Range{kRefcountTableField, sizeof fields}, fields);
  if (status.ok()) status = io_.sync();
  image_.header.refcountTableOffset = offset;
  image_.header.refcountTableClusters = static_cast<uint32_t>(place.count);
  return Outcome::of(status);
}

void Refcounts::trim() {
  const size_t most = std::max<size_t>(2, kKeptBytes >> image_.geometry.clusterBits);
  if (blocks_.size() > most && dirty_.empty()) blocks_.clear();
}

void Refcounts::reset() {
  blocks_.clear();
  dirty_.clear();
  added_.clear();
}

}  // namespace thicken::qcow2
