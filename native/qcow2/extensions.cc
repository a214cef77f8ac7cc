#include "bytes.h"
#include "header.h"

namespace thicken::qcow2 {
namespace {

constexpr uint32_t kEnd = 0;
constexpr uint32_t kBackingFormat = 0xe2792aca;
constexpr uint32_t kFeatureNames = 0x6803f857;
constexpr uint32_t kBitmaps = 0x23852875;
constexpr uint32_t kEncryption = 0x0537be77;
constexpr uint32_t kDataFile = 0x44415441;

constexpr uint32_t kMaxName = 1023;
constexpr uint32_t kMaxBitmaps = 65535;
constexpr uint64_t kMaxDirectory = 64ull << 20;

Outcome corrupt(const char* what, uint64_t at) {
  return Outcome::refused(Code::corrupt, what, Range{at, 8});
}

Outcome readName(const uint8_t* data, uint32_t length, uint64_t at, std::string* name) {
  if (length > kMaxName)
    return Outcome::refused(Code::absurd, "a name of " + std::to_string(length) + " bytes",
                            Range{at, 8});
  name->assign(data, data + length);
  return {};
}

Outcome readBitmaps(const uint8_t* data, uint32_t length, uint64_t at, Header* header) {
  if (length != 24) return corrupt("a bitmaps extension of the wrong length", at);
  header->hasBitmaps = true;
  // Without its bit the extension is what another program left behind: not to be believed.
  if ((header->autoclear & kBitmapsBit) == 0) {
    header->allKnown = false;
    return {};
  }
  header->bitmapCount = load32(data);
  header->bitmapDirectory = Range{load64(data + 16), load64(data + 8)};
  if (header->bitmapCount == 0) return corrupt("a bitmaps extension without bitmaps", at);
  if (header->bitmapCount > kMaxBitmaps || header->bitmapDirectory.length > kMaxDirectory)
    return Outcome::refused(Code::absurd,
                            "a directory of " + std::to_string(header->bitmapCount) + " bitmaps",
                            Range{at, 8});
  return {};
}

Outcome readEncryption(const uint8_t* data, uint32_t length, uint64_t at, Header* header) {
  if (length != 16 || header->cryptMethod != 2)
    return corrupt("an encryption header that does not belong here", at);
  header->luks = Range{load64(data), load64(data + 8)};
  return {};
}

Outcome readExtension(uint32_t type, const uint8_t* data, uint32_t length, uint64_t at,
                      Header* header) {
  switch (type) {
    case kBackingFormat:
      return readName(data, length, at, &header->backingFormat);
    case kDataFile:
      return readName(data, length, at, &header->dataFile);
    case kBitmaps:
      return readBitmaps(data, length, at, header);
    case kEncryption:
      return readEncryption(data, length, at, header);
    case kFeatureNames:
      return {};
    default:
      header->allKnown = false;
      return {};
  }
}

}  // namespace

Outcome parseExtensions(const std::vector<uint8_t>& data, Header* header) {
  const uint64_t backing = load64(data.data() + 8);
  const uint64_t end = backing == 0 ? data.size() : backing;
  uint64_t at = header->headerLength;
  while (end - at >= 8) {
    const uint32_t type = load32(data.data() + at);
    const uint32_t length = load32(data.data() + at + 4);
    if (type == kEnd) break;
    if (length > end - at - 8) return corrupt("a header extension beyond its area", at);
    Outcome outcome = readExtension(type, data.data() + at + 8, length, at, header);
    if (!outcome.ok()) return outcome;
    at += 8 + ((uint64_t{length} + 7) & ~7ull);
    if (at > end) break;
  }
  if ((header->autoclear & kBitmapsBit) != 0 && !header->hasBitmaps)
    return corrupt("the bitmaps bit without a bitmaps extension", kAutoclearField);
  if (header->cryptMethod == 2 && header->luks.length == 0)
    return corrupt("LUKS encryption without its header", 32);
  return {};
}

}  // namespace thicken::qcow2
