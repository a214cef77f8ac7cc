#include <memory>

#include "../qcow2/allocate.h"
#include "../qcow2/map.h"
#include "check.h"
#include "qcow2_content.h"
#include "qcow2_crash.h"
#include "qcow2_image.h"
#include "qcow2_look.h"
#include "qcow2_meddled.h"

using namespace thicken::qcow2;
using thicken::CancelFlag;
using thicken::Range;
using thicken::Status;
using thicken_test::allocateAll;
using thicken_test::everything;
using thicken_test::ImageOptions;
using thicken_test::makeImage;
using thicken_test::mapOf;
using thicken_test::MemoryIo;
using thicken_test::surveyOf;

namespace {

/// Fails from the n-th change on, as a disk that is gone does.
class FailingIo final : public Io {
 public:
  FailingIo(Io& io, uint64_t after) : io_(io), left_(after) {}

  Status read(Range range, void* data, size_t* got) override { return io_.read(range, data, got); }
  Status write(Range range, const void* data) override {
    return works() ? io_.write(range, data) : Status{EIO, "pwrite", range.offset, range.length};
  }
  Status writeZeros(Range range) override {
    return works() ? io_.writeZeros(range) : Status{EIO, "pwrite", range.offset, range.length};
  }
  Status reserve(Range range, bool keepSize) override {
    if (!canReserve) return Status{EOPNOTSUPP, "fallocate", range.offset, range.length};
    return works() ? io_.reserve(range, keepSize)
                   : Status{ENOSPC, "fallocate", range.offset, range.length};
  }
  Status sync() override { return works() ? io_.sync() : Status{EIO, "fdatasync"}; }
  Status size(uint64_t* bytes) override { return io_.size(bytes); }

  bool hasFailed() const { return failed_; }
  bool canReserve = true;

 private:
  bool works() {
    if (left_ > 0) {
      left_--;
      return true;
    }
    failed_ = true;
    return false;
  }

  Io& io_;
  uint64_t left_;
  bool failed_ = false;
};

}  // namespace

TEST(qcow2CountsOfEveryWidthAreReadBack) {
  for (uint32_t order = 0; order <= 6; order++) {
    Geometry geometry;
    geometry.clusterBits = 9;
    geometry.refcountOrder = order;
    std::vector<uint8_t> block(geometry.clusterSize());
    const uint64_t most = geometry.refcountMax();
    for (uint64_t i = 0; i < geometry.blockEntries(); i++)
      setCount(block.data(), order, i, (i * 2654435761u) & most);
    setCount(block.data(), order, 7, most);
    setCount(block.data(), order, 8, 0);
    for (uint64_t i = 0; i < geometry.blockEntries(); i++) {
      const uint64_t expected = i == 7 ? most : i == 8 ? 0 : (i * 2654435761u) & most;
      CHECK(getCount(block.data(), order, i) == expected);
    }
  }
}

TEST(qcow2LayoutPutsEachBlockIntoItsOwnRegion) {
  const auto hasBlock = [](uint64_t index) { return index < 2; };
  Layout layout(150, 500, 64, hasBlock);
  CHECK(layout.area().first == 150);
  uint64_t taken = 0;
  for (uint64_t left = 500; left > 0;) {
    const ClusterRun run = layout.take(left);
    for (const ClusterRun& block : layout.blocks())
      CHECK(block.count < run.first || block.count >= run.end());
    CHECK(run.count > 0);
    if (run.count == 0) break;
    left -= run.count;
    taken = run.end();
  }
  CHECK(taken == layout.end());
  CHECK(layout.blocks().size() == layout.area().count - 500);
  for (const ClusterRun& block : layout.blocks()) CHECK(block.count / 64 == block.first);
}

TEST(qcow2AllocatesEveryRefcountWidthAndGrowsTheTable) {
  for (uint32_t order = 0; order <= 6; order++) {
    ImageOptions options;
    options.refcountOrder = order;
    options.virtualSize = (4 << 20) + 700;
    MemoryIo io(makeImage(options));
    CHECK(allocateAll(io, nullptr, everything(), 300000).ok());
    const Survey survey = surveyOf(io);
    CHECK(survey.leaks.empty());
    CHECK(survey.excess.empty());
    for (const uint8_t state : mapOf(io, 100).state)
      CHECK(state == static_cast<uint8_t>(GuestState::data));
  }
}

TEST(qcow2SurveyInManyWindowsFindsTheSame) {
  ImageOptions options;
  options.virtualSize = 2 << 20;
  MemoryIo io(makeImage(options));
  Request request = everything();
  request.range = Range{123456, 654321};
  CHECK(allocateAll(io, nullptr, request, ~0ull).ok());
  // A leak behind the end of the file.
  Image image;
  CHECK(openImage(io, &image).ok());
  const uint64_t last = image.hostClusters() + 3;
  const uint64_t block = image.refcountTable[last / 256];
  CHECK(block != 0);
  setCount(&io.bytes()[block], 4, last % 256, 1);
  const Survey once = surveyOf(io);
  const Survey often = surveyOf(io, 300);
  CHECK(once.leaks.size() == 1 && once.leaks[0].first == last);
  CHECK(often.leaks.size() == once.leaks.size());
  CHECK(often.excess.empty() && once.excess.empty());
  CHECK(often.counted == once.counted);
  CHECK(often.end == once.end && once.end == last + 1);
}

TEST(qcow2MapIsTheSameInPagesOfAnySize) {
  ImageOptions options;
  options.virtualSize = (1 << 20) + 100;
  MemoryIo io(makeImage(options));
  Request request = everything(Level::metadata);
  for (uint64_t at = 0; at < options.virtualSize; at += 20000) {
    request.range = Range{at, 5000 + at % 3000};
    CHECK(allocateAll(io, nullptr, request, ~0ull).ok());
  }
  const MapPage whole = mapOf(io, ~0ull >> 1);
  CHECK(whole.size() > 50);
  double end = 0;
  for (size_t i = 0; i < whole.size(); i++) {
    CHECK(whole.offset[i] == end);
    end += whole.length[i];
  }
  CHECK(end == static_cast<double>(options.virtualSize));
  for (const size_t page : {size_t{1}, size_t{2}, size_t{7}, size_t{50}}) {
    const MapPage paged = mapOf(io, page);
    CHECK(paged.offset == whole.offset);
    CHECK(paged.length == whole.length);
    CHECK(paged.host == whole.host);
    CHECK(paged.state == whole.state);
  }
}

TEST(qcow2CancelledWorkChangesNothing) {
  MemoryIo io(makeImage(ImageOptions{}));
  Image image;
  CHECK(openImage(io, &image).ok());
  CancelFlag cancel;
  cancel.set();
  bool cancelled = false;
  {
    Allocator allocator(io, nullptr, image);
    CHECK(allocator.prepare(everything(), cancel, &cancelled).ok());
    Progress progress;
    // An image without a table has nothing to walk, and measuring notices first.
    CHECK(cancelled);
    CHECK(allocator.allocate(Range{0, 1 << 20}, cancel, &progress).code == Code::stale);
  }
  CancelFlag later;
  thicken_test::MeddledIo meddled(io, 1, [&] { later.set(); });
  Allocator allocator(meddled, nullptr, image);
  CHECK(allocator.prepare(everything(Level::full), CancelFlag(), &cancelled).ok());
  Progress progress;
  CHECK(allocator.allocate(Range{0, 1 << 20}, cancel, &progress).ok());
  CHECK(progress.cancelled && io.bytes().size() == 4 * 512);
  CHECK(allocator.allocate(Range{0, 1 << 20}, later, &progress).ok());
  CHECK(progress.cancelled);
  CHECK(progress.next == 0);
  const Survey survey = surveyOf(io);
  CHECK(survey.leaks.empty());
  CHECK(survey.counted == 4);
  // What was chosen before is chosen again.
  const uint64_t size = io.bytes().size();
  CHECK(allocator.allocate(Range{0, 1 << 20}, CancelFlag(), &progress).ok());
  CHECK(!progress.cancelled);
  CHECK(io.bytes().size() == size);
  MapReader reader(io, allocator.image());
  MapPage page;
  CHECK(reader.read(Range{0, 1 << 20}, 10, cancel, &page).ok());
  CHECK(page.cancelled);
}

TEST(qcow2FailureAtAnyChangeIsToldAndHarmless) {
  ImageOptions options;
  options.refcountOrder = 6;
  options.virtualSize = 3 << 20;
  uint64_t failures = 0;
  for (uint64_t after = 0;; after++) {
    MemoryIo io(makeImage(options));
    FailingIo failing(io, after);
    const Outcome outcome = allocateAll(failing, nullptr, everything(Level::full), 1 << 20);
    if (!failing.hasFailed()) {
      CHECK(outcome.ok());
      break;
    }
    failures++;
    CHECK(outcome.code == Code::io);
    CHECK(outcome.status.error == EIO || outcome.status.error == ENOSPC);
    CHECK(allocateAll(io, nullptr, everything(), ~0ull).ok());
    const Survey survey = surveyOf(io);
    CHECK(survey.leaks.empty());
    CHECK(survey.excess.empty());
  }
  CHECK(failures > 30);
}

TEST(qcow2WithoutFallocateNewClustersAreWritten) {
  MemoryIo io(makeImage(ImageOptions{}));
  std::vector<thicken_test::Operation> log;
  thicken_test::RecordingIo recording(io, 0, &log);
  FailingIo without(recording, ~0ull);
  without.canReserve = false;
  CHECK(allocateAll(without, nullptr, everything(), ~0ull).ok());
  uint64_t zeros = 0;
  for (const thicken_test::Operation& operation : log)
    if (operation.kind == thicken_test::Operation::Kind::write && operation.data.empty())
      zeros += operation.range.length;
  CHECK(zeros >= 1 << 20);
}

TEST(qcow2UnknownAutoclearBitsAreClearedFirst) {
  ImageOptions options;
  options.autoclear = 1u << 5;
  MemoryIo io(makeImage(options));
  std::vector<thicken_test::Operation> log;
  thicken_test::RecordingIo recording(io, 0, &log);
  CHECK(allocateAll(recording, nullptr, everything(), ~0ull).ok());
  CHECK(log.size() > 2);
  CHECK(log[0].kind == thicken_test::Operation::Kind::write);
  CHECK(log[0].range.offset == kAutoclearField);
  CHECK(log[1].kind == thicken_test::Operation::Kind::sync);
  CHECK(load64(&io.bytes()[kAutoclearField]) == 0);
}

TEST(qcow2LeaksOfImagesWithUnknownFeaturesStay) {
  for (const uint64_t compatible : {uint64_t{0}, uint64_t{1} << 7}) {
    ImageOptions options;
    options.compatible = compatible;
    std::vector<uint8_t> bytes = makeImage(options);
    bytes.resize(bytes.size() + 512 * 4, 0x77);
    setCount(&bytes[2 * 512], 4, 5, 1);
    MemoryIo io(bytes);
    Request request = everything();
    request.range = Range{0, 512};
    CHECK(allocateAll(io, nullptr, request, ~0ull).ok());
    Image image;
    CHECK(openImage(io, &image).ok());
    Refcounts counts(io, image);
    uint64_t count = 0;
    CHECK(counts.get(5, &count).ok());
    CHECK(count == 1);
    const bool reused = mapOf(io, 10).host[0] == 5 * 512;
    CHECK(reused == (compatible == 0));
    // It is made zeros before it is data.
    CHECK(io.bytes()[5 * 512] == (reused ? 0 : 0x77));
    // Nor is what lies behind the last counted cluster.
    if (compatible != 0) CHECK(io.bytes()[7 * 512] == 0x77);
  }
}

TEST(qcow2RangesBeyondAllBoundsAreClipped) {
  MemoryIo io(makeImage(ImageOptions{}));
  Request request = everything();
  request.range = Range{(1 << 20) - 700, ~0ull};
  Image image;
  CHECK(openImage(io, &image).ok());
  Allocator allocator(io, nullptr, image);
  bool cancelled = false;
  CHECK(allocator.prepare(request, CancelFlag(), &cancelled).ok());
  CHECK(allocator.needed().data == 2);
  Progress progress;
  CHECK(allocator.allocate(request.range, CancelFlag(), &progress).ok());
  CHECK(progress.next == 1 << 20);
  CHECK(progress.mapped == 1024);
  CHECK(allocator.allocate(Range{1 << 21, 5}, CancelFlag(), &progress).ok());
  CHECK(progress.next == 1 << 21);
  CHECK(progress.mapped == 0);
  MapReader reader(io, allocator.image());
  MapPage page;
  CHECK(reader.read(Range{100, ~0ull}, 10, CancelFlag(), &page).ok());
  CHECK(page.next == 1 << 20);
  CHECK(page.size() == 2);
}

TEST(qcow2CrashStatesOfAGrowingTable) {
  ImageOptions options;
  options.refcountOrder = 6;
  options.virtualSize = 3 << 20;
  thicken_test::CrashOptions crash;
  crash.request = everything();
  crash.samples = 20;
  const thicken_test::CrashResult result =
      thicken_test::replayCrashes(makeImage(options), {}, crash);
  CHECK(result.failure.empty());
  CHECK(result.states > 200);
  CHECK(result.leaking > 20);
}
