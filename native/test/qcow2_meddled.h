#pragma once

#include <functional>
#include <utility>

#include "../qcow2/geometry.h"
#include "../qcow2/io.h"

namespace thicken_test {

using thicken::Range;
using thicken::Status;

/// A file to which something is done just before its n-th piece of zeros.
class MeddledIo final : public thicken::qcow2::Io {
 public:
  MeddledIo(thicken::qcow2::Io& io, uint64_t piece, std::function<void()> meddle)
      : io_(io), left_(piece), meddle_(std::move(meddle)) {}

  Status read(Range range, void* data, size_t* got) override { return io_.read(range, data, got); }
  Status write(Range range, const void* data) override { return io_.write(range, data); }
  Status writeZeros(Range range) override {
    // The end of a file that grows is no piece.
    if (range.length > thicken::qcow2::kSectorSize) count();
    return io_.writeZeros(range);
  }
  Status clear(Range range) override {
    count();
    return io_.clear(range);
  }
  Status reserve(Range range, bool keepSize) override { return io_.reserve(range, keepSize); }
  Status sync() override { return io_.sync(); }
  Status size(uint64_t* bytes) override { return io_.size(bytes); }
  bool disturbed() override { return io_.disturbed(); }

 private:
  void count() {
    if (--left_ == 0) meddle_();
  }

  thicken::qcow2::Io& io_;
  uint64_t left_;
  std::function<void()> meddle_;
};

}  // namespace thicken_test
