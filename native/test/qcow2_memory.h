#pragma once

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <vector>

#include "../qcow2/io.h"

namespace thicken_test {

using thicken::Range;
using thicken::Status;

/// A file in memory, of a bounded size.
class MemoryIo final : public thicken::qcow2::Io {
 public:
  explicit MemoryIo(std::vector<uint8_t> bytes = {}, uint64_t most = 1u << 30)
      : bytes_(std::move(bytes)), most_(most) {}

  std::vector<uint8_t>& bytes() { return bytes_; }
  const std::vector<uint8_t>& bytes() const { return bytes_; }

  Status read(Range range, void* data, size_t* got) override {
    *got = 0;
    if (range.offset >= bytes_.size()) return {};
    *got = std::min<uint64_t>(range.length, bytes_.size() - range.offset);
    std::memcpy(data, bytes_.data() + range.offset, *got);
    return {};
  }

  Status write(Range range, const void* data) override {
    if (!grow(range)) return Status{ENOSPC, "pwrite", range.offset, range.length};
    std::memcpy(bytes_.data() + range.offset, data, range.length);
    return {};
  }

  Status writeZeros(Range range) override {
    if (!grow(range)) return Status{ENOSPC, "pwrite", range.offset, range.length};
    std::memset(bytes_.data() + range.offset, 0, range.length);
    return {};
  }

  Status reserve(Range range, bool keepSize) override {
    if (!keepSize && !grow(range)) return Status{ENOSPC, "fallocate", range.offset, range.length};
    return {};
  }

  Status sync() override { return {}; }

  Status size(uint64_t* bytes) override {
    *bytes = bytes_.size();
    return {};
  }

 private:
  bool grow(Range range) {
    if (range.offset > most_ || range.length > most_ - range.offset) return false;
    if (range.end() > bytes_.size()) bytes_.resize(range.end());
    return true;
  }

  std::vector<uint8_t> bytes_;
  uint64_t most_;
};

/// One thing that was done to a file.
struct Operation {
  enum class Kind : uint8_t { write, reserve, sync };
  Kind kind = Kind::write;
  int file = 0;
  Range range;
  bool keepSize = false;
  std::vector<uint8_t> data;  ///< of a write; empty for zeros
};

/// Does what it is told to another, and notes it.
class RecordingIo final : public thicken::qcow2::Io {
 public:
  RecordingIo(thicken::qcow2::Io& io, int file, std::vector<Operation>* log)
      : io_(io), file_(file), log_(log) {}

  Status read(Range range, void* data, size_t* got) override { return io_.read(range, data, got); }

  Status write(Range range, const void* data) override {
    const uint8_t* bytes = static_cast<const uint8_t*>(data);
    note(Operation::Kind::write, range).data.assign(bytes, bytes + range.length);
    return io_.write(range, data);
  }

  Status writeZeros(Range range) override {
    note(Operation::Kind::write, range);
    return io_.writeZeros(range);
  }

  Status reserve(Range range, bool keepSize) override {
    note(Operation::Kind::reserve, range).keepSize = keepSize;
    return io_.reserve(range, keepSize);
  }

  Status sync() override {
    note(Operation::Kind::sync, Range{});
    return io_.sync();
  }

  Status size(uint64_t* bytes) override { return io_.size(bytes); }

 private:
  Operation& note(Operation::Kind kind, Range range) {
    log_->push_back(Operation{kind, file_, range, false, {}});
    return log_->back();
  }

  thicken::qcow2::Io& io_;
  int file_;
  std::vector<Operation>* log_;
};

}  // namespace thicken_test
