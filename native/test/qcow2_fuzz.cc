// Map and allocate of whatever bytes there are (libFuzzer). The input is an image, and behind it a
// few bytes that choose the request. What is not refused must come out with the same content, and
// pass a survey.
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../qcow2/allocate.h"
#include "../qcow2/bytes.h"
#include "../qcow2/map.h"
#include "qcow2_content.h"
#include "qcow2_memory.h"

using namespace thicken::qcow2;
using thicken::CancelFlag;
using thicken::Range;
using thicken_test::ContentReader;
using thicken_test::MemoryIo;

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed);

namespace {

constexpr size_t kChoice = 8;
constexpr uint64_t kMostFile = 8u << 20;
constexpr uint64_t kMostGuest = 4u << 20;

struct Files {
  MemoryIo file;
  MemoryIo data;
};

void require(bool holds, int line = __builtin_LINE()) {
  if (holds) return;
  std::fprintf(stderr, "%s:%d does not hold\n", __FILE__, line);
  std::abort();
}

void map(Files* files, const Image& image) {
  MapReader reader(files->file, image);
  uint64_t at = 0;
  for (int i = 0; i < 64 && at < image.geometry.virtualSize; i++) {
    MapPage page;
    const Range rest{at, image.geometry.virtualSize - at};
    if (!reader.read(rest, 64, CancelFlag(), &page).ok()) return;
    require(page.next > at && page.next <= image.geometry.virtualSize);
    at = page.next;
  }
}

std::vector<std::vector<uint8_t>> contentOf(Files* files, const Image& image,
                                            const Request& request) {
  ContentReader reader(files->file, files->data, image);
  if (request.backingEnd == 0) reader.setBackingIsEmpty();
  std::vector<std::vector<uint8_t>> content{reader.active()};
  for (size_t i = 0; i < image.snapshots.size() && i < 4; i++)
    content.push_back(reader.snapshot(image.snapshots[i]));
  return content;
}

Request requestOf(const uint8_t* choice, uint64_t virtualSize) {
  Request request;
  request.level = static_cast<Level>(choice[0] % 3);
  request.backingEnd = (choice[0] & 4) != 0 ? 0 : ~0ull;
  request.range = Range{0, virtualSize};
  if ((choice[0] & 8) != 0 && virtualSize > 0) {
    request.range.offset = (uint64_t{load16(choice + 1)} << 5) % virtualSize;
    request.range.length = uint64_t{load16(choice + 3)} << 5;
  }
  return request;
}

Outcome allocate(Files* files, const Image& image, const Request& request, uint64_t piece) {
  Allocator allocator(files->file, &files->data, image);
  bool cancelled = false;
  Outcome outcome = allocator.prepare(request, CancelFlag(), &cancelled);
  const uint64_t end = std::min(request.range.end(), image.geometry.virtualSize);
  Progress progress;
  for (uint64_t at = request.range.offset; outcome.ok() && at < end; at = progress.next) {
    outcome = allocator.allocate(Range{at, std::min(piece, end - at)}, CancelFlag(), &progress);
    require(!outcome.ok() || progress.next > at);
  }
  if (outcome.ok()) outcome = allocator.finish(CancelFlag(), &progress);
  return outcome;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < kChoice) return 0;
  const uint8_t* choice = data + size - kChoice;
  Files files{MemoryIo(std::vector<uint8_t>(data, choice), kMostFile), MemoryIo({}, kMostGuest)};
  Image image;
  if (!openImage(files.file, &image).ok()) return 0;
  map(&files, image);
  if (image.geometry.virtualSize > kMostGuest) return 0;
  Survey survey;
  if (!surveyImage(files.file, image, CancelFlag(), &survey).ok()) return 0;
  const Request request = requestOf(choice, image.geometry.virtualSize);
  const std::vector<std::vector<uint8_t>> before = contentOf(&files, image, request);
  const bool known = image.header.allKnown;
  const Outcome outcome =
      allocate(&files, image, request,
               (choice[0] & 16) != 0 ? 1 + (uint64_t{load16(choice + 5)} << 4) : kMostGuest);
  // A file that can't grow is an error, and no corruption either.
  require(outcome.code != Code::corrupt && outcome.code != Code::overlap &&
          outcome.code != Code::outsideFile && outcome.code != Code::stale);
  require(openImage(files.file, &image).ok());
  require(surveyImage(files.file, image, CancelFlag(), &survey).ok());
  if (outcome.ok() && known) require(survey.leaks.empty());
  require(contentOf(&files, image, request) == before);
  return 0;
}

// Tables are made of words of eight bytes: most of what is interesting is a change to one of them.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::minstd_rand random(seed);
  if (size < 1024 || random() % 4 == 0) return LLVMFuzzerMutate(data, size, most);
  for (unsigned i = 0; i <= random() % 3; i++) {
    const size_t area = random() % 3 == 0 ? 112 : size - kChoice;
    uint8_t* word = data + random() % (area / 8) * 8;
    const uint64_t value = load64(word);
    const uint64_t other = load64(data + random() % ((size - kChoice) / 8) * 8);
    const uint64_t choices[] = {
        value ^ kCopied,
        value ^ kCompressed,
        value ^ kZero,
        value ^ 1ull << random() % 64,
        value + (1u << 9),
        value - (1u << 9),
        other,
        uint64_t{random() % 256} << 9,
        value & kOffsetMask,
        other | kCopied,
        uint64_t{random() % 8},
        0,
    };
    store64(word, choices[random() % (sizeof choices / sizeof *choices)]);
  }
  return size;
}
