#include <algorithm>
#include <functional>

#include "bytes.h"
#include "references.h"

namespace thicken::qcow2 {
namespace {

constexpr uint64_t kFixedLength = 24;
constexpr uint64_t kEntryReserved = 0xff000000000001fe;
// A bitmap's table is read in parts of this many entries.
constexpr uint64_t kPart = 64 * 1024;

Outcome corrupt(const char* what, Range where) {
  return Outcome::refused(Code::corrupt, what, where);
}

Outcome addBytes(const Image& image, Range bytes, ReferenceSink* sink) {
  const Geometry& geometry = image.geometry;
  if (!geometry.isAligned(bytes.offset) || bytes.offset == 0)
    return corrupt("a bitmap's table does not start on a cluster", bytes);
  if (!image.contains(bytes))
    return Outcome::refused(Code::outsideFile, "a bitmap lies outside the file", bytes);
  const uint64_t first = bytes.offset >> geometry.clusterBits;
  return sink->add(
      Reference{ClusterRun{first, geometry.clustersFor(bytes.end()) - first}, Use::exclusive});
}

Outcome walkTable(Io& io, const Image& image, uint64_t offset, uint64_t entries,
                  ReferenceSink* sink) {
  Outcome outcome = addBytes(image, Range{offset, entries * 8}, sink);
  std::vector<uint64_t> words;
  for (uint64_t at = 0; outcome.ok() && at < entries; at += words.size()) {
    outcome = readWords(io, offset + at * 8, std::min(kPart, entries - at), &words);
    for (size_t i = 0; outcome.ok() && i < words.size(); i++) {
      const uint64_t data = words[i] & kOffsetMask;
      const bool reserved = (words[i] & kEntryReserved) != 0 || (data != 0 && (words[i] & 1) != 0);
      if (reserved)
        return corrupt("an invalid entry in a bitmap's table", Range{offset + (at + i) * 8, 8});
      if (data != 0) outcome = addBytes(image, Range{data, image.geometry.clusterSize()}, sink);
    }
  }
  return outcome;
}

// `use` gets where each bitmap's table lies, and how many entries it has.
Outcome eachBitmap(Io& io, const Image& image,
                   const std::function<Outcome(uint64_t, uint64_t)>& use) {
  const Range directory = image.header.bitmapDirectory;
  std::vector<uint8_t> bytes(directory.length);
  Outcome outcome = Outcome::of(readPadded(io, directory, bytes.data()));
  uint64_t at = 0;
  for (uint32_t i = 0; outcome.ok() && i < image.header.bitmapCount; i++) {
    if (bytes.size() - at < kFixedLength) return corrupt("a bitmap directory cut short", directory);
    const uint8_t* entry = bytes.data() + at;
    const uint64_t length = kFixedLength + load16(entry + 18) + uint64_t{load32(entry + 20)};
    const uint64_t padded = (length + 7) & ~7ull;
    if (padded > bytes.size() - at) return corrupt("a bitmap directory cut short", directory);
    outcome = use(load64(entry), load32(entry + 8));
    at += padded;
  }
  return outcome;
}

}  // namespace

Outcome walkBitmaps(Io& io, const Image& image, ReferenceSink* sink) {
  if (image.header.bitmapCount == 0) return {};
  Outcome outcome = addBytes(image, image.header.bitmapDirectory, sink);
  if (!outcome.ok()) return outcome;
  return eachBitmap(io, image, [&](uint64_t offset, uint64_t entries) {
    return walkTable(io, image, offset, entries, sink);
  });
}

Outcome measureBitmaps(Io& io, const Image& image, uint64_t* clusters) {
  const Geometry& geometry = image.geometry;
  *clusters = 0;
  if (image.header.bitmapCount == 0) return {};
  *clusters = geometry.clustersFor(image.header.bitmapDirectory.length);
  return eachBitmap(io, image, [&](uint64_t, uint64_t entries) {
    *clusters += entries + geometry.clustersFor(entries * 8);
    return Outcome{};
  });
}

}  // namespace thicken::qcow2
