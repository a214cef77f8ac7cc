#include "../allocate.h"

#include <sys/stat.h>

#include <algorithm>
#include <random>

#include "check.h"
#include "temporary_file.h"

using thicken::CancelFlag;
using thicken::Fallocate;
using thicken::FallocateMode;
using thicken::fallocateRanges;
using thicken::Range;
using thicken::Status;
using thicken::Work;
using thicken::ZeroWrite;
using thicken::zeroWriteRanges;
using thicken_test::Kind;
using thicken_test::Segment;
using thicken_test::TemporaryFile;

namespace {

constexpr uint64_t kBlock = 4096;

struct stat factsOf(const TemporaryFile& file) {
  struct stat facts {};
  thicken_test::require(fstat(file.fd(), &facts) == 0, "fstat");
  return facts;
}

uint64_t sizeOf(const TemporaryFile& file) { return static_cast<uint64_t>(factsOf(file).st_size); }

uint64_t allocatedIn(TemporaryFile& file) {
  file.sync();
  return static_cast<uint64_t>(factsOf(file).st_blocks) * 512;
}

bool isReadable(int fd) {
  void* block = nullptr;
  thicken_test::require(posix_memalign(&block, kBlock, kBlock) == 0, "posix_memalign");
  const bool readable = pread(fd, block, kBlock, 0) >= 0;
  std::free(block);
  return readable;
}

ZeroWrite buffered(const TemporaryFile& file) {
  ZeroWrite options;
  options.bufferedFd = file.fd();
  options.granularity = kBlock;
  options.expectedSize = sizeOf(file);
  return options;
}

const std::vector<Segment> kSegments = {{Kind::data, 3 * kBlock},   {Kind::hole, 50 * kBlock},
                                        {Kind::data, kBlock},       {Kind::hole, 4096 * kBlock},
                                        {Kind::data, 2 * kBlock},   {Kind::hole, kBlock},
                                        {Kind::data, kBlock + 100}, {Kind::hole, 2 * kBlock + 7}};

void checkFill(ZeroWrite options, TemporaryFile& file) {
  const uint64_t size = sizeOf(file);
  const std::vector<uint8_t> before = file.read(0, size);
  Work work;
  const Status status = zeroWriteRanges(options, {Range{0, size}}, CancelFlag(), &work);
  CHECK(status.ok());
  CHECK(!work.cancelled);
  CHECK(work.allocated + work.skipped == size);
  CHECK(work.skipped >= 7 * kBlock + 100);
  CHECK(sizeOf(file) == size);
  CHECK(file.read(0, size) == before);
  CHECK(allocatedIn(file) >= size);
}

}  // namespace

TEST(fallocateFillsRangesAndKeepsTheSize) {
  TemporaryFile file;
  file.resize(1 << 20);
  Work work;
  Status status =
      fallocateRanges(Fallocate{file.fd(), FallocateMode::reserve, sizeOf(file), 1},
                      {Range{0, 64 << 10}, Range{512 << 10, 128 << 10}}, CancelFlag(), &work);
  if (status.error == EOPNOTSUPP) {
    std::printf("unsupported here: fallocate\n");
    return;
  }
  CHECK(status.ok());
  CHECK(work.allocated == 192 << 10 && work.requests == 2 && !work.cancelled);
  CHECK(allocatedIn(file) >= 192 << 10 && allocatedIn(file) < 300 << 10);
  status = fallocateRanges(Fallocate{file.fd(), FallocateMode::reserve, sizeOf(file), 1},
                           {Range{2 << 20, 64 << 10}}, CancelFlag(), &work);
  CHECK(status.ok());
  CHECK(sizeOf(file) == 1 << 20);
}

TEST(fallocateKeepsData) {
  TemporaryFile file;
  file.lay(kSegments);
  const uint64_t size = sizeOf(file);
  const std::vector<uint8_t> before = file.read(0, size);
  Work work;
  const Status status =
      fallocateRanges(Fallocate{file.fd(), FallocateMode::reserve, sizeOf(file), 1},
                      {Range{0, size}}, CancelFlag(), &work);
  if (status.error == EOPNOTSUPP) return;
  CHECK(status.ok());
  CHECK(file.read(0, size) == before);
  CHECK(allocatedIn(file) >= size);
}

TEST(fallocateNamesTheRangeThatFailed) {
  TemporaryFile file;
  const int readOnly = file.open(O_RDONLY);
  Work work;
  const Status status = fallocateRanges(Fallocate{readOnly, FallocateMode::reserve, 0, 1},
                                        {Range{4096, 8192}}, CancelFlag(), &work);
  close(readOnly);
  CHECK(status.error == EBADF && status.offset == 4096 && status.length == 8192);
  CHECK(work.allocated == 0 && work.requests == 0);
}

TEST(fallocateSpansNeighboursInOneCall) {
  TemporaryFile file;
  file.lay(kSegments);
  const uint64_t size = sizeOf(file);
  const std::vector<uint8_t> before = file.read(0, size);
  Work work;
  const Status status = fallocateRanges(
      Fallocate{file.fd(), FallocateMode::reserve, size, 2},
      {Range{0, 4096}, Range{size / 2, 4096}, Range{size - 4096, 4096}}, CancelFlag(), &work);
  if (status.error == EOPNOTSUPP) return;
  CHECK(status.ok());
  CHECK(work.requests == 2 && work.allocated == 3 * 4096);
  CHECK(file.read(0, size) == before);
}

TEST(fallocateStopsAtAnotherSize) {
  TemporaryFile file;
  file.resize(1 << 20);
  Work work;
  const Status status = fallocateRanges(Fallocate{file.fd(), FallocateMode::reserve, 2 << 20, 1},
                                        {Range{0, 4096}}, CancelFlag(), &work);
  CHECK(status.error == ESTALE && work.requests == 0);
  CHECK(allocatedIn(file) == 0);
}

TEST(cancelledWorkDoesNothing) {
  TemporaryFile file;
  file.resize(1 << 20);
  CancelFlag cancel;
  cancel.set();
  Work reserved;
  CHECK(fallocateRanges(Fallocate{file.fd(), FallocateMode::reserve, sizeOf(file), 1},
                        {Range{0, 4096}}, cancel, &reserved)
            .ok());
  CHECK(reserved.cancelled && reserved.requests == 0);
  Work written;
  CHECK(zeroWriteRanges(buffered(file), {Range{0, 1 << 20}}, cancel, &written).ok());
  CHECK(written.cancelled && written.requests == 0);
  CHECK(allocatedIn(file) == 0);
}

TEST(zeroWriteFillsHolesAndKeepsDataBuffered) {
  TemporaryFile file;
  file.lay(kSegments);
  checkFill(buffered(file), file);
}

TEST(zeroWriteFillsHolesAndKeepsDataDirect) {
  TemporaryFile file;
  file.lay(kSegments);
  const int direct =
      ::open(("/proc/self/fd/" + std::to_string(file.fd())).c_str(), O_RDWR | O_DIRECT | O_CLOEXEC);
  if (direct < 0 || !isReadable(direct)) {
    std::printf("unsupported here: O_DIRECT\n");
    if (direct >= 0) close(direct);
    return;
  }
  ZeroWrite options = buffered(file);
  options.directFd = direct;
  options.directAlignment = kBlock;
  options.directMinimum = 16 * kBlock;
  checkFill(options, file);
  close(direct);
}

TEST(zeroWriteStaysInsideItsRanges) {
  TemporaryFile file;
  file.resize(1 << 20);
  Work work;
  CHECK(zeroWriteRanges(buffered(file), {Range{64 << 10, 64 << 10}, Range{512 << 10, 64 << 10}},
                        CancelFlag(), &work)
            .ok());
  CHECK(work.allocated == 128 << 10 && work.skipped == 0);
  const uint64_t allocated = allocatedIn(file);
  CHECK(allocated >= 128 << 10 && allocated < 200 << 10);
}

TEST(zeroWriteLeavesARandomFileAsItWas) {
  std::mt19937 random(3);
  for (int round = 0; round < 30; round++) {
    TemporaryFile file;
    const uint64_t size = 1 + random() % (2 << 20);
    file.resize(size);
    for (int i = 0; i < 20; i++) {
      const uint64_t at = random() % size;
      file.write(at, std::vector<uint8_t>(std::min<uint64_t>(1 + random() % 9000, size - at),
                                          static_cast<uint8_t>(random())));
    }
    const std::vector<uint8_t> before = file.read(0, size);
    const uint64_t from = random() % size / kBlock * kBlock;
    Work work;
    CHECK(zeroWriteRanges(buffered(file), {Range{from, size - from}}, CancelFlag(), &work).ok());
    CHECK(work.allocated + work.skipped == size - from);
    CHECK(file.read(0, size + 1) == before);
  }
}

TEST(zeroWriteStopsWhereTheFileWasCut) {
  TemporaryFile file;
  file.resize(1 << 20);
  const ZeroWrite options = buffered(file);
  file.resize(64 << 10);
  Work work;
  const Status status = zeroWriteRanges(options, {Range{32 << 10, 512 << 10}}, CancelFlag(), &work);
  CHECK(status.error == ESTALE);
  CHECK(work.requests == 0 && work.allocated == 0);
  CHECK(sizeOf(file) == 64 << 10);
  CHECK(allocatedIn(file) == 0);
}

TEST(zeroWriteWantsTheSizeThatWasExpected) {
  TemporaryFile file;
  file.resize(1 << 20);
  ZeroWrite options = buffered(file);
  file.resize(2 << 20);
  Work work;
  CHECK(zeroWriteRanges(options, {Range{0, 4096}}, CancelFlag(), &work).error == ESTALE);
  options.expectedSize = 2 << 20;
  CHECK(zeroWriteRanges(options, {Range{0, 4096}}, CancelFlag(), &work).ok());
}

TEST(zeroWriteBehindTheEndIsRefused) {
  TemporaryFile file;
  file.resize(1 << 20);
  Work work;
  const Status status =
      zeroWriteRanges(buffered(file), {Range{(1 << 20) - 4096, 8192}}, CancelFlag(), &work);
  CHECK(status.error == ESTALE);
  CHECK(sizeOf(file) == 1 << 20);
}
