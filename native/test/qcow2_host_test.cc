#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <random>

#include "../qcow2/allocate.h"
#include "check.h"
#include "qcow2_crash.h"
#include "qcow2_image.h"
#include "qcow2_memory.h"
#include "temporary_file.h"

using namespace thicken::qcow2;
using thicken::CancelFlag;
using thicken::ExtentMethod;
using thicken::ExtentPage;
using thicken::HostState;
using thicken::Range;
using thicken::readExtents;
using thicken_test::ImageOptions;
using thicken_test::Kind;
using thicken_test::makeImage;
using thicken_test::MemoryIo;
using thicken_test::Segment;
using thicken_test::TemporaryFile;

namespace {

constexpr uint64_t kBlock = 64 << 10;

std::vector<Segment> manySegments(size_t count) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < count; i++)
    segments.push_back(Segment{i % 2 == 0 ? Kind::data : Kind::hole, kBlock});
  return segments;
}

uint8_t stateAt(const ExtentPage& page, uint64_t offset) {
  for (size_t i = 0; i < page.size(); i++)
    if (page.offset[i] <= static_cast<double>(offset) &&
        static_cast<double>(offset) < page.offset[i] + page.length[i])
      return page.state[i];
  return 255;
}

struct Joint {
  std::vector<JoinedPage> pages;
  size_t extents = 0;
};

Joint joinAll(const Image& image, int fd, size_t most) {
  Joint joint;
  const HostFiles files{fd, ExtentMethod::seek, -1, ExtentMethod::seek};
  for (uint64_t at = 0; at < image.geometry.virtualSize;) {
    JoinedPage page;
    const Range rest{at, image.geometry.virtualSize - at};
    CHECK(readJoined(image, files, rest, most, CancelFlag(), &page).ok());
    CHECK(page.next > at && page.size() <= 5 * most);
    if (page.next <= at) break;
    joint.extents += page.size();
    at = page.next;
    joint.pages.push_back(std::move(page));
  }
  return joint;
}

// What each byte of the disk is, whatever pages it came in.
std::vector<std::pair<uint8_t, double>> flatten(const Joint& joint, uint64_t step) {
  std::vector<std::pair<uint8_t, double>> flat;
  double next = 0;
  for (const JoinedPage& page : joint.pages)
    for (size_t i = 0; i < page.size(); i++) {
      CHECK(page.offset[i] == next);
      next = page.offset[i] + page.length[i];
      for (auto at = static_cast<uint64_t>(page.offset[i]); at < static_cast<uint64_t>(next);
           at += step)
        flat.emplace_back(
            page.state[i],
            page.host[i] < 0 ? -1 : page.host[i] + static_cast<double>(at) - page.offset[i]);
    }
  return flat;
}

// Swaps the clusters of entries of one L2 table, so that the disk lies scattered.
void scatter(std::vector<uint8_t>* bytes, const Image& image) {
  std::minstd_rand random(7);
  for (const uint64_t entry : image.l1) {
    uint8_t* table = bytes->data() + (entry & kOffsetMask);
    for (uint64_t i = image.geometry.tableEntries() - 1; i > 0; i--) {
      const uint64_t j = random() % (i + 1);
      const uint64_t kept = load64(table + i * 8);
      store64(table + i * 8, load64(table + j * 8));
      store64(table + j * 8, kept);
    }
  }
}

}  // namespace

TEST(qcow2HostLookupFindsWhatAScanFinds) {
  TemporaryFile file;
  CHECK(file.lay(manySegments(300)));
  ExtentPage all;
  const uint64_t end = 300 * kBlock;
  CHECK(readExtents(file.fd(), ExtentMethod::seek, Range{0, end}, 1000, CancelFlag(), &all).ok());
  HostLookup lookup(file.fd(), ExtentMethod::seek);
  std::minstd_rand random(3);
  for (int round = 0; round < 400; round++) {
    const uint64_t offset = random() % (end - 1);
    const Range range{offset, 1 + random() % std::min<uint64_t>(end - offset, 5 * kBlock)};
    uint64_t at = range.offset;
    CHECK(lookup
              .find(range, round % 2 == 0 ? end : 0, CancelFlag(),
                    [&](Range part, HostState state, uint32_t) {
                      CHECK(part.offset == at && part.length > 0);
                      CHECK(static_cast<uint8_t>(state) == stateAt(all, part.offset));
                      at = part.end();
                      return true;
                    })
              .ok());
    CHECK(at == range.end());
  }
}

TEST(qcow2HostLookupOfNoFileIsUnknown) {
  HostLookup lookup(-1, ExtentMethod::fiemap);
  HostState found = HostState::hole;
  CHECK(lookup
            .find(Range{5, 10}, 0, CancelFlag(),
                  [&](Range, HostState state, uint32_t) {
                    found = state;
                    return true;
                  })
            .ok());
  CHECK(found == HostState::unknown);
}

TEST(qcow2JoinIsTheSameInPagesOfAnySize) {
  ImageOptions options;
  options.clusterBits = 12;
  options.virtualSize = 4 << 20;
  MemoryIo io(makeImage(options));
  Request request;
  request.level = Level::metadata;
  for (uint64_t at = 0; at < options.virtualSize; at += 60000) {
    request.range = Range{at, 20000};
    CHECK(thicken_test::allocateAll(io, nullptr, request, ~0ull).ok());
  }
  Image image;
  CHECK(openImage(io, &image).ok());
  scatter(&io.bytes(), image);
  TemporaryFile file;
  file.resize(io.bytes().size());
  // Tables, and every third block of what follows: the rest are holes.
  for (uint64_t at = 0; at < io.bytes().size(); at += 4096) {
    const bool zero = std::all_of(io.bytes().begin() + static_cast<ptrdiff_t>(at),
                                  io.bytes().begin() + static_cast<ptrdiff_t>(at + 4096),
                                  [](uint8_t byte) { return byte == 0; });
    if (zero && at / 4096 % 3 != 0) continue;
    file.write(at, std::vector<uint8_t>(io.bytes().begin() + static_cast<ptrdiff_t>(at),
                                        io.bytes().begin() + static_cast<ptrdiff_t>(at + 4096)));
  }
  file.sync();
  const auto whole = flatten(joinAll(image, file.fd(), 4096), 4096);
  CHECK(whole.size() == options.virtualSize / 4096);
  for (const size_t most : {1u, 2u, 7u, 100u})
    CHECK(flatten(joinAll(image, file.fd(), most), 4096) == whole);
}

TEST(qcow2JoinStopsWhenCancelled) {
  ImageOptions options;
  MemoryIo io(makeImage(options));
  Image image;
  CHECK(openImage(io, &image).ok());
  CancelFlag cancel;
  cancel.set();
  JoinedPage page;
  TemporaryFile file;
  const HostFiles files{file.fd(), ExtentMethod::seek, -1, ExtentMethod::seek};
  CHECK(readJoined(image, files, Range{0, 1 << 20}, 10, cancel, &page).ok());
  CHECK(page.cancelled && page.size() == 0);
}
