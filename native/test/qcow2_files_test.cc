#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "../gate.h"
#include "../qcow2/allocate.h"
#include "check.h"
#include "qcow2_crash.h"
#include "qcow2_image.h"
#include "qcow2_look.h"
#include "qcow2_meddled.h"
#include "temporary_file.h"

using namespace thicken::qcow2;
using thicken::CancelFlag;
using thicken::OpenGate;
using thicken::Range;
using thicken_test::allocateAll;
using thicken_test::everything;
using thicken_test::ImageOptions;
using thicken_test::makeImage;
using thicken_test::mapOf;
using thicken_test::MeddledIo;
using thicken_test::surveyOf;
using thicken_test::TemporaryFile;

namespace {

constexpr uint64_t kMiB = 1u << 20;
constexpr uint64_t kDisk = 32 * kMiB;
constexpr uint8_t kOld = 0x77;
constexpr Level kLevels[] = {Level::falloc, Level::full};

ImageOptions optionsOf(uint64_t incompatible = 0) {
  ImageOptions options;
  options.clusterBits = 16;
  options.virtualSize = kDisk;
  options.incompatible = incompatible;
  return options;
}

/// An empty image, and behind it old bytes where its clusters are going to lie. Where these begin.
uint64_t layOld(TemporaryFile* file) {
  std::vector<uint8_t> bytes = makeImage(optionsOf());
  const uint64_t start = bytes.size();
  bytes.resize(start + kDisk + 8 * kMiB, kOld);
  file->write(0, bytes);
  return start;
}

bool isAll(const std::vector<uint8_t>& bytes, uint8_t value) {
  return std::all_of(bytes.begin(), bytes.end(), [value](uint8_t byte) { return byte == value; });
}

uint64_t sizeOf(const TemporaryFile& file) {
  uint64_t size = 0;
  FileIo io(file.fd());
  CHECK(io.size(&size).ok());
  return size;
}

}  // namespace

TEST(qcow2ClearingEndsWithThePieceInWhichSomebodyOpensTheFile) {
  for (const Level level : kLevels) {
    TemporaryFile file;
    const uint64_t start = layOld(&file);
    OpenGate gate;
    CHECK(gate.watch(file.fd()).ok());
    FileIo io(file.fd(), -1, 0, &gate);
    MeddledIo meddled(io, 2, [&] { close(file.open(O_RDONLY)); });
    Image image;
    CHECK(openImage(meddled, &image).ok());
    Allocator allocator(meddled, nullptr, std::move(image));
    bool cancelled = false;
    CHECK(allocator.prepare(everything(level), CancelFlag(), &cancelled).ok());
    gate.reset();
    Progress progress;
    CHECK(allocator.allocate(Range{0, kDisk}, CancelFlag(), &progress).ok());
    CHECK(progress.disturbed && !progress.cancelled);
    CHECK(progress.next == 0 && progress.mapped == 0);
    // What follows the piece may be somebody else's by now.
    CHECK(isAll(file.read(start, 16 * kMiB), 0));
    CHECK(isAll(file.read(start + 16 * kMiB, 16 * kMiB), kOld));
    CHECK(surveyOf(io).counted == 4);
    CHECK(mapOf(io, 10).state == std::vector<uint8_t>{0});
    gate.reset();
    CHECK(allocateAll(io, nullptr, everything(level), ~0ull).ok());
    CHECK(surveyOf(io).leaks.empty());
    CHECK(isAll(file.read(start, kDisk), 0));
  }
}

TEST(qcow2LeaksStayWhereSomebodyHasOpenedTheFile) {
  TemporaryFile file;
  std::vector<uint8_t> bytes = makeImage(optionsOf());
  const uint64_t leak = bytes.size() >> 16;
  setCount(&bytes[2 << 16], 4, leak, 1);
  bytes.resize(bytes.size() + (1 << 16), kOld);
  file.write(0, bytes);
  OpenGate gate;
  CHECK(gate.watch(file.fd()).ok());
  FileIo io(file.fd(), -1, 0, &gate);
  Image image;
  CHECK(openImage(io, &image).ok());
  Allocator allocator(io, nullptr, std::move(image));
  bool cancelled = false;
  Request request = everything();
  request.range = Range{0, 0};
  CHECK(allocator.prepare(request, CancelFlag(), &cancelled).ok());
  gate.reset();
  close(file.open(O_RDONLY));
  Progress progress;
  CHECK(allocator.finish(CancelFlag(), &progress).ok());
  CHECK(progress.disturbed);
  CHECK(surveyOf(io).leaks.size() == 1);
  // What was known of the image is no more.
  gate.reset();
  CHECK(allocator.finish(CancelFlag(), &progress).code == Code::stale);
}

TEST(qcow2FileThatWasTruncatedIsNotGrownAgain) {
  for (const Level level : kLevels) {
    TemporaryFile file;
    const uint64_t start = layOld(&file);
    FileIo io(file.fd());
    const uint64_t cut = start + 4 * kMiB;
    MeddledIo meddled(io, 2, [&] { file.resize(cut); });
    const Outcome outcome = allocateAll(meddled, nullptr, everything(level), ~0ull);
    CHECK(outcome.code == Code::stale || outcome.status.error == ESTALE);
    // The piece itself was begun before.
    CHECK(sizeOf(file) == (level == Level::full ? start + 16 * kMiB : cut));
    CHECK(surveyOf(io).counted == 4);
  }
}

TEST(qcow2FileThatIsTruncatedBetweenCallsIsNotGrownAgain) {
  TemporaryFile file;
  file.write(0, makeImage(optionsOf()));
  FileIo io(file.fd());
  Image image;
  CHECK(openImage(io, &image).ok());
  Allocator allocator(io, nullptr, std::move(image));
  bool cancelled = false;
  CHECK(allocator.prepare(everything(Level::metadata), CancelFlag(), &cancelled).ok());
  Progress progress;
  CHECK(allocator.allocate(Range{0, kDisk / 2}, CancelFlag(), &progress).ok());
  const uint64_t cut = sizeOf(file) - kMiB;
  file.resize(cut);
  CHECK(allocator.allocate(Range{kDisk / 2, kDisk / 2}, CancelFlag(), &progress).code ==
        Code::stale);
  CHECK(allocator.finish(CancelFlag(), &progress).code == Code::stale);
  CHECK(sizeOf(file) == cut);
}

TEST(qcow2DataFileThatWasTruncatedIsNotGrownAgain) {
  for (const Level level : kLevels) {
    TemporaryFile file;
    TemporaryFile data;
    file.write(0, makeImage(optionsOf(kExternalDataBit)));
    data.write(0, std::vector<uint8_t>(kDisk, kOld));
    FileIo io(file.fd());
    FileIo dataIo(data.fd());
    MeddledIo meddled(dataIo, 2, [&] { data.resize(20 * kMiB); });
    const Outcome outcome = allocateAll(io, &meddled, everything(level), ~0ull);
    CHECK(outcome.code == Code::stale);
    CHECK(sizeOf(data) == 20 * kMiB);
    CHECK(isAll(data.read(16 * kMiB, 4 * kMiB), kOld));
    CHECK(surveyOf(io).counted == 4);
  }
}

TEST(qcow2ClearNeverGrowsAFile) {
  TemporaryFile file;
  file.write(0, std::vector<uint8_t>(3 * kMiB + 100, kOld));
  FileIo io(file.fd());
  CHECK(io.clear(Range{kMiB, 4 * kMiB}).ok());
  CHECK(io.clear(Range{8 * kMiB, kMiB}).ok());
  CHECK(sizeOf(file) == 3 * kMiB + 100);
  CHECK(isAll(file.read(0, kMiB), kOld));
  CHECK(isAll(file.read(kMiB, 2 * kMiB + 100), 0));
}
