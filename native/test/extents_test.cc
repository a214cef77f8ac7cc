#include "../extents.h"

#include <linux/magic.h>
#include <sys/vfs.h>

#include <atomic>
#include <cstring>
#include <random>
#include <thread>

#include "check.h"
#include "temporary_file.h"

using thicken::CancelFlag;
using thicken::ExtentMethod;
using thicken::ExtentPage;
using thicken::HostState;
using thicken::Range;
using thicken::readExtents;
using thicken::Status;
using thicken_test::Kind;
using thicken_test::Segment;
using thicken_test::TemporaryFile;

namespace {

constexpr uint64_t kUnit = 64 << 10;
constexpr size_t kAll = 1 << 16;

struct Extent {
  uint64_t offset;
  uint64_t length;
  uint8_t state;
  uint32_t flags;
};

bool operator==(const Extent& a, const Extent& b) {
  return a.offset == b.offset && a.length == b.length && a.state == b.state && a.flags == b.flags;
}

void append(const ExtentPage& page, std::vector<Extent>* extents) {
  for (size_t i = 0; i < page.size(); i++)
    extents->push_back(Extent{static_cast<uint64_t>(page.offset[i]),
                              static_cast<uint64_t>(page.length[i]), page.state[i], page.flags[i]});
}

std::vector<Extent> scan(int fd, ExtentMethod method, Range range, size_t pageSize) {
  std::vector<Extent> extents;
  const CancelFlag cancel;
  for (uint64_t at = range.offset; at < range.end();) {
    ExtentPage page;
    const Status status =
        readExtents(fd, method, Range{at, range.end() - at}, pageSize, cancel, &page);
    CHECK(status.ok());
    CHECK(page.size() > 0 && page.size() <= pageSize);
    CHECK(page.next > at);
    if (!status.ok() || page.next <= at) break;
    append(page, &extents);
    at = page.next;
  }
  return extents;
}

bool isGapless(const std::vector<Extent>& extents, Range range) {
  uint64_t at = range.offset;
  for (size_t i = 0; i < extents.size(); i++) {
    if (extents[i].offset != at || extents[i].length == 0) return false;
    if (i > 0 && extents[i].state == extents[i - 1].state &&
        extents[i].flags == extents[i - 1].flags)
      return false;
    at += extents[i].length;
  }
  return at == range.end();
}

/// Clips what was found for the whole file to a range.
std::vector<Extent> clip(const std::vector<Extent>& extents, Range range) {
  std::vector<Extent> clipped;
  for (const Extent& extent : extents) {
    const uint64_t from = std::max(extent.offset, range.offset);
    const uint64_t to = std::min(extent.offset + extent.length, range.end());
    if (from < to) clipped.push_back(Extent{from, to - from, extent.state, extent.flags});
  }
  return clipped;
}

std::vector<Segment> randomSegments(uint32_t seed, size_t count, bool withUnwritten) {
  std::mt19937 random(seed);
  std::vector<Segment> segments;
  for (size_t i = 0; i < count; i++) {
    const auto kind = static_cast<Kind>(random() % 3);
    const Kind possible = kind == Kind::unwritten && !withUnwritten ? Kind::hole : kind;
    segments.push_back(Segment{possible, kUnit * (1 + random() % 4)});
  }
  // Not a whole block, as the files that the world has.
  segments.push_back(Segment{Kind::data, 1000});
  return segments;
}

uint64_t sizeOf(const std::vector<Segment>& segments) {
  uint64_t size = 0;
  for (const Segment& segment : segments) size += segment.length;
  return size;
}

uint8_t stateOf(Kind kind, ExtentMethod method) {
  if (kind == Kind::data) return static_cast<uint8_t>(HostState::written);
  // The others can't tell reserved from missing.
  const bool tells = method == ExtentMethod::fiemap || method == ExtentMethod::pages;
  if (kind == Kind::hole || !tells) return static_cast<uint8_t>(HostState::hole);
  return static_cast<uint8_t>(HostState::unwritten);
}

bool isLaidOut(const std::vector<Extent>& extents, const std::vector<Segment>& segments,
               ExtentMethod method) {
  uint64_t at = 0;
  for (const Segment& segment : segments) {
    for (const Extent& part : clip(extents, Range{at, segment.length}))
      if (part.state != stateOf(segment.kind, method)) return false;
    at += segment.length;
  }
  return true;
}

bool supports(int fd, ExtentMethod method) {
  ExtentPage page;
  const Status status = readExtents(fd, method, Range{0, 1}, 1, CancelFlag(), &page);
  if (status.ok()) return true;
  CHECK(status.error == EOPNOTSUPP || status.error == ENOTTY || status.error == EINVAL);
  CHECK(std::strcmp(status.syscall, "") != 0);
  std::printf("unsupported here: method %d\n", static_cast<int>(method));
  return false;
}

void checkMethod(ExtentMethod method, uint32_t seed, size_t segmentCount) {
  TemporaryFile file;
  const bool unwritten = file.reserve(0, kUnit);
  file.resize(0);
  const std::vector<Segment> segments = randomSegments(seed, segmentCount, unwritten);
  CHECK(file.lay(segments));
  if (!supports(file.fd(), method)) return;

  const Range whole{0, sizeOf(segments)};
  const std::vector<Extent> extents = scan(file.fd(), method, whole, kAll);
  CHECK(isGapless(extents, whole));
  CHECK(isLaidOut(extents, segments, method));
  for (size_t pageSize : {1u, 2u, 3u, 7u})
    CHECK(scan(file.fd(), method, whole, pageSize) == extents);

  std::mt19937 random(seed);
  for (int round = 0; round < 50; round++) {
    const uint64_t from = random() % whole.length;
    const Range part{from, 1 + random() % (whole.length - from)};
    for (size_t pageSize : {1 + random() % 5, 30 + random() % 5})
      CHECK(scan(file.fd(), method, part, pageSize) == clip(extents, part));
  }

  // Past the end of the file there is a hole.
  const Range beyond{0, whole.length + (1 << 20)};
  const std::vector<Extent> further = scan(file.fd(), method, beyond, kAll);
  CHECK(isGapless(further, beyond));
  CHECK(!further.empty() && further.back().state == static_cast<uint8_t>(HostState::hole));
}

}  // namespace

TEST(pageMergesEqualNeighboursOnly) {
  ExtentPage page;
  page.add(Range{0, 10}, HostState::hole, 0);
  page.add(Range{10, 5}, HostState::hole, 0);
  page.add(Range{15, 5}, HostState::written, 0);
  page.add(Range{20, 5}, HostState::written, 8);
  page.add(Range{25, 5}, HostState::written, 8);
  page.add(Range{30, 1}, HostState::unwritten, 8);
  std::vector<Extent> extents;
  append(page, &extents);
  CHECK((extents ==
         std::vector<Extent>{{0, 15, 0, 0}, {15, 5, 2, 0}, {20, 10, 2, 8}, {30, 1, 1, 8}}));
}

TEST(fiemapTellsTheFile) {
  for (uint32_t seed = 1; seed <= 6; seed++) checkMethod(ExtentMethod::fiemap, seed, 40);
}

TEST(seekTellsTheFile) {
  for (uint32_t seed = 1; seed <= 6; seed++) checkMethod(ExtentMethod::seek, seed, 40);
}

TEST(pagesTellTheFileOnTmpfs) {
  struct statfs facts;
  CHECK(statfs(TemporaryFile::folder().c_str(), &facts) == 0);
  // Elsewhere the page cache says nothing of what is reserved.
  if (facts.f_type != TMPFS_MAGIC) return;
  for (uint32_t seed = 1; seed <= 6; seed++) checkMethod(ExtentMethod::pages, seed, 40);
}

TEST(fibmapTellsTheFile) { checkMethod(ExtentMethod::fibmap, 1, 20); }

TEST(fiemapMergesAcrossItsBatches) {
  // More extents than one call brings.
  constexpr size_t kCount = 5000;
  constexpr uint64_t kBlock = 64 << 10;
  TemporaryFile file;
  file.resize(2 * kCount * kBlock);
  const std::vector<uint8_t> byte(1, 1);
  for (size_t i = 0; i < kCount; i++) file.write(2 * i * kBlock, byte);
  file.sync();
  if (!supports(file.fd(), ExtentMethod::fiemap)) return;
  const Range whole{0, 2 * kCount * kBlock};
  const std::vector<Extent> extents = scan(file.fd(), ExtentMethod::fiemap, whole, kAll);
  CHECK(extents.size() == 2 * kCount);
  CHECK(isGapless(extents, whole));
  for (size_t pageSize : {2047u, 2048u, 2049u, 4096u})
    CHECK(scan(file.fd(), ExtentMethod::fiemap, whole, pageSize) == extents);
}

TEST(fiemapTellsOfARangeBehindTheLargestFile) {
  TemporaryFile file;
  file.resize(100 << 20);
  if (!supports(file.fd(), ExtentMethod::fiemap)) return;
  const Range range{0, 20ull << 40};
  // The first time brings the hole into memory.
  for (int i = 0; i < 2; i++)
    CHECK((scan(file.fd(), ExtentMethod::fiemap, range, 100) ==
           std::vector<Extent>{{0, range.length, 0, 0}}));
}

TEST(fiemapOnXfsTellsThePlaceOfAllThatAWriterWrites) {
  struct statfs facts;
  CHECK(statfs(TemporaryFile::folder().c_str(), &facts) == 0);
  // Elsewhere a write gets in between FIEMAP's sync and its answer.
  if (facts.f_type != XFS_SUPER_MAGIC) return;
  TemporaryFile file;
  constexpr uint64_t kSize = 64 << 20;
  file.resize(kSize);
  std::atomic<bool> over{false};
  std::thread writer([&] {
    const std::vector<uint8_t> block(4096, 7);
    std::mt19937 random(7);
    while (!over) file.write(random() % (kSize / 8192) * 8192, block);
  });
  size_t unknown = 0;
  for (int i = 0; i < 60; i++)
    for (const Extent& extent : scan(file.fd(), ExtentMethod::fiemap, Range{0, kSize}, 4096))
      if (extent.state == static_cast<uint8_t>(HostState::unknown)) unknown++;
  over = true;
  writer.join();
  CHECK(unknown == 0);
}

TEST(emptyRangeAndEmptyFileGiveWhatIsThere) {
  TemporaryFile file;
  for (ExtentMethod method : {ExtentMethod::fiemap, ExtentMethod::seek}) {
    if (!supports(file.fd(), method)) continue;
    ExtentPage none;
    CHECK(readExtents(file.fd(), method, Range{4096, 0}, 1, CancelFlag(), &none).ok());
    CHECK(none.size() == 0 && none.next == 4096);
    CHECK((scan(file.fd(), method, Range{0, 5000}, 3) == std::vector<Extent>{{0, 5000, 0, 0}}));
  }
}

TEST(cancelledScanStopsAtOnce) {
  TemporaryFile file;
  file.resize(1 << 20);
  CancelFlag cancel;
  cancel.set();
  for (ExtentMethod method : {ExtentMethod::fiemap, ExtentMethod::seek, ExtentMethod::fibmap}) {
    ExtentPage page;
    CHECK(readExtents(file.fd(), method, Range{0, 1 << 20}, 10, cancel, &page).ok());
    CHECK(page.cancelled && page.size() == 0 && page.next == 0);
  }
}

TEST(scanOfBadDescriptorFails) {
  ExtentPage page;
  const Status status =
      readExtents(-1, ExtentMethod::fiemap, Range{0, 4096}, 1, CancelFlag(), &page);
  CHECK(status.error == EBADF);
  CHECK(std::strcmp(status.syscall, "fstatfs") == 0);
}
