#pragma once

#include <cstdint>
#include <vector>

#include "header.h"

namespace thicken::qcow2 {

/// Reads the L2 tables of an L1 table in ascending order, many at a time.
class TableReader {
 public:
  TableReader(Io& io, const Image& image, const std::vector<uint64_t>& l1)
      : io_(io), image_(image), l1_(l1) {}

  /// `table` is nullptr where L1 has none. It stays valid until the next call.
  Outcome get(uint64_t index, const uint8_t** table);

  /// Bytes of tables read at once. A small one suits a reader that stops soon.
  void setBatch(uint64_t bytes) { batch_ = bytes; }

 private:
  Outcome load(uint64_t index);

  Io& io_;
  const Image& image_;
  const std::vector<uint64_t>& l1_;
  uint64_t batch_ = 2u << 20;
  uint64_t first_ = 0;
  uint64_t end_ = 0;
  std::vector<uint64_t> places_;  ///< index in `bytes_` of each table of [first_, end_), plus 1
  std::vector<uint8_t> bytes_;
};

}  // namespace thicken::qcow2
