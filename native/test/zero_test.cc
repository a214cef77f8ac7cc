#include "../zero.h"

#include <random>

#include "check.h"

using thicken::findZeroRuns;
using thicken::isZero;
using thicken::Range;

namespace {

bool naiveIsZero(const uint8_t* data, size_t length) {
  for (size_t i = 0; i < length; i++)
    if (data[i] != 0) return false;
  return true;
}

std::vector<Range> naiveRuns(const uint8_t* data, size_t length, size_t unit, uint64_t base) {
  std::vector<Range> runs;
  for (size_t at = 0; at < length; at += unit) {
    const size_t part = length - at < unit ? length - at : unit;
    if (!naiveIsZero(data + at, part)) continue;
    if (!runs.empty() && runs.back().end() == base + at)
      runs.back().length += part;
    else
      runs.push_back(Range{base + at, part});
  }
  return runs;
}

bool same(const std::vector<Range>& a, const std::vector<Range>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); i++)
    if (a[i].offset != b[i].offset || a[i].length != b[i].length) return false;
  return true;
}

}  // namespace

TEST(isZeroSeesEachSingleByteAtEachAlignment) {
  constexpr size_t kLongest = 300;
  std::vector<uint8_t> buffer(64 + kLongest + 1);
  for (size_t start = 0; start < 64; start++) {
    for (size_t length = 0; length <= kLongest; length += length < 140 ? 1 : 37) {
      // What lies around the range must not count.
      std::fill(buffer.begin(), buffer.end(), uint8_t{0xff});
      uint8_t* data = buffer.data() + start;
      std::fill(data, data + length, uint8_t{0});
      CHECK(isZero(data, length));
      for (size_t i = 0; i < length; i++) {
        data[i] = static_cast<uint8_t>(1u << (i % 8));
        if (isZero(data, length)) CHECK(!"a byte was missed");
        data[i] = 0;
      }
    }
  }
}

TEST(isZeroAgreesWithModelOnRandomBuffers) {
  std::mt19937 random(1);
  for (int round = 0; round < 2000; round++) {
    std::vector<uint8_t> buffer(random() % 5000);
    if (!buffer.empty() && random() % 3 != 0)
      buffer[random() % buffer.size()] = static_cast<uint8_t>(random());
    CHECK(isZero(buffer.data(), buffer.size()) == naiveIsZero(buffer.data(), buffer.size()));
  }
}

TEST(findZeroRunsAgreesWithModel) {
  std::mt19937 random(2);
  for (int round = 0; round < 3000; round++) {
    const size_t unit = size_t{1} << (random() % 13);
    std::vector<uint8_t> buffer(random() % 20000 + 7);
    const size_t start = random() % 8;
    for (uint64_t i = random() % 6; i > 0; i--)
      buffer[random() % buffer.size()] = static_cast<uint8_t>(random());
    const uint8_t* data = buffer.data() + start - (start > 6 ? 1 : 0);
    const size_t length = buffer.size() - 7;
    const uint64_t base = uint64_t{random()} << 20;
    const std::vector<Range> expected = naiveRuns(data, length, unit, base);
    std::vector<Range> runs;
    uint64_t total = 0;
    for (const Range& run : expected) total += run.length;
    CHECK(findZeroRuns(data, length, unit, base, &runs) == total);
    CHECK(same(runs, expected));
  }
}

TEST(findZeroRunsGoesOnWhereTheLastRunEnded) {
  const std::vector<uint8_t> zeros(8192);
  std::vector<Range> runs;
  CHECK(findZeroRuns(zeros.data(), 4096, 512, 1 << 20, &runs) == 4096);
  CHECK(findZeroRuns(zeros.data(), 8192, 512, (1 << 20) + 4096, &runs) == 8192);
  CHECK(same(runs, {Range{1 << 20, 12288}}));
  findZeroRuns(zeros.data(), 512, 512, (1 << 20) + 12288 + 512, &runs);
  CHECK(runs.size() == 2);
}

TEST(zeroBufferIsZeroAndAligned) {
  const void* zeros = thicken::zeroBuffer();
  CHECK(zeros != nullptr);
  CHECK(reinterpret_cast<uintptr_t>(zeros) % 4096 == 0);
  CHECK(isZero(zeros, thicken::kZeroBufferSize));
  CHECK(zeros == thicken::zeroBuffer());
}
