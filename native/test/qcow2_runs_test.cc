#include <chrono>
#include <functional>
#include <random>

#include "../qcow2/allocate.h"
#include "../qcow2/entry.h"
#include "../qcow2/map.h"
#include "check.h"
#include "qcow2_image.h"
#include "temporary_file.h"

using namespace thicken::qcow2;
using thicken::CancelFlag;
using thicken::Range;
using thicken_test::ImageOptions;
using thicken_test::makeImage;
using thicken_test::TemporaryFile;

namespace {

constexpr uint32_t kLargeBits = 21;
constexpr uint64_t kLarge = 1ull << kLargeBits;
/// Once through a table of 2 MiB takes some milliseconds; once for each entry, minutes.
constexpr double kMostSeconds = 20;

ImageOptions largeOptions(uint64_t incompatible, uint64_t virtualSize) {
  ImageOptions options;
  options.clusterBits = kLargeBits;
  options.virtualSize = virtualSize;
  options.incompatible = incompatible;
  return options;
}

/// The image with one table in its last cluster, for the beginning of the disk.
std::vector<uint8_t> withTable(const ImageOptions& options) {
  std::vector<uint8_t> bytes = makeImage(options);
  const uint64_t place = bytes.size();
  bytes.resize(place + kLarge);
  store64(&bytes[3 * kLarge], kCopied | place);
  setCount(&bytes[2 * kLarge], options.refcountOrder, place >> kLargeBits, 1);
  return bytes;
}

double secondsOf(const std::function<void()>& work) {
  const auto began = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

struct Kind {
  uint32_t version;
  bool extended;
  bool external;
};

constexpr Kind kKinds[] = {
    {2, false, false}, {3, false, false}, {3, true, false}, {3, false, true}, {3, true, true}};

Image imageOf(const Kind& kind) {
  Image image;
  image.geometry.version = kind.version;
  image.geometry.clusterBits = 9;
  image.geometry.extended = kind.extended;
  image.geometry.externalData = kind.external;
  image.fileSize = 40 * 512 + 100;
  return image;
}

// Short runs of all kinds, each now and then broken by a bit.
void fillTable(const Image& image, uint64_t guestStart, std::mt19937_64& random,
               std::vector<uint8_t>* table) {
  const Geometry& geometry = image.geometry;
  const uint64_t entries = geometry.tableEntries();
  const uint64_t bitmaps[] = {0, kAllAllocated, kAllZero, 0x0f, 0xf00000000f, 0xf0000000f0};
  for (uint64_t i = 0; i < entries;) {
    const uint64_t place = geometry.externalData ? (guestStart + i) << 9 : (random() % 50) << 9;
    Entry entry{random() % 3 == 0 ? 0 : place};
    if (random() % 3 != 0) entry.word |= kCopied;
    if (random() % 6 == 0) entry.word |= kZero;
    if (random() % 20 == 0) entry.word |= kCompressed;
    if (random() % 20 == 0) entry.word += 512;
    if (random() % 20 == 0) entry.word |= 1ull << (random() % 64);
    if (geometry.extended) entry.bitmap = bitmaps[random() % 6];
    const bool grows = entry.offset() != 0 || (geometry.externalData && entry.isCopied());
    for (uint64_t n = 1 + random() % 12; n > 0 && i < entries; n--, i++) {
      storeEntry(geometry, table->data(), i, entry);
      if (grows) entry.word += 512;
    }
  }
}

}  // namespace

TEST(qcow2RunsAreTheEntriesOneByOne) {
  std::mt19937_64 random(7);
  for (const Kind& kind : kKinds) {
    const Image image = imageOf(kind);
    const Geometry& geometry = image.geometry;
    const uint64_t entries = geometry.tableEntries();
    uint64_t faults = 0;
    uint64_t runs = 0;
    for (uint64_t round = 0; round < 2000; round++) {
      const uint64_t guestStart = (round % 3) * entries;
      std::vector<uint8_t> table(geometry.clusterSize());
      fillTable(image, guestStart, random, &table);
      for (uint64_t i = random() % 3; i < entries;) {
        const uint64_t end = i + 1 + random() % (entries - i);
        const EntryRun run = loadRun(image, table.data(), guestStart, i, end);
        CHECK(run.count > 0 && i + run.count <= end);
        const char* fault = entryFault(image, run.first, guestStart + i);
        for (uint64_t k = 0; k < run.count; k++) {
          const Entry entry = loadEntry(geometry, table.data(), i + k);
          CHECK(run.at(k).word == entry.word && run.at(k).bitmap == entry.bitmap);
          CHECK(entryFault(image, entry, guestStart + i + k) == fault);
        }
        if (fault != nullptr) faults++;
        runs++;
        i += run.count;
      }
    }
    CHECK(faults > 1000 && runs > 2000 + faults);
  }
}

TEST(qcow2MapOfPartsGoesThroughATableOnce) {
  const uint64_t span = (kLarge / 16) << kLargeBits;
  TemporaryFile file;
  file.write(0, withTable(largeOptions(kExtendedL2Bit, span)));
  FileIo io(file.fd());
  Image image;
  CHECK(openImage(io, &image).ok());
  MapReader reader(io, image);
  MapPage page;
  const double seconds = secondsOf([&] {
    CHECK(reader.read(Range{0, span}, 100, CancelFlag(), &page).ok());
  });
  CHECK(page.size() == 1 && page.next == span);
  CHECK(seconds < kMostSeconds);
}

TEST(qcow2FaultAtTheEndOfALongRunIsFoundAtOnce) {
  const uint64_t entries = kLarge / 8;
  std::vector<uint8_t> bytes = withTable(largeOptions(0, entries << kLargeBits));
  const uint64_t table = bytes.size() - kLarge;
  const uint64_t first = bytes.size() >> kLargeBits;
  for (uint64_t i = 0; i < entries; i++)
    store64(&bytes[table + i * 8], kCopied | (first + i) << kLargeBits);
  TemporaryFile file;
  file.write(0, bytes);
  // A cluster may begin where the file ends.
  file.resize((first + entries - 2) << kLargeBits);
  FileIo io(file.fd());
  Image image;
  CHECK(openImage(io, &image).ok());
  Outcome walked;
  Outcome mapped;
  const double seconds = secondsOf([&] {
    Survey survey;
    walked = surveyImage(io, image, CancelFlag(), &survey);
    MapReader reader(io, image);
    MapPage page;
    mapped = reader.read(Range{0, ~0ull}, 100, CancelFlag(), &page);
  });
  CHECK(walked.code == Code::corrupt && walked.status.offset == table + (entries - 1) * 8);
  CHECK(mapped.code == Code::corrupt && mapped.status.offset == (entries - 1) << kLargeBits);
  CHECK(seconds < kMostSeconds);
}
