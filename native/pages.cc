#include "pages.h"

#include <sys/mman.h>

#include <cstdint>
#include <utility>

namespace thicken {
namespace {

constexpr size_t kHugePage = 2u << 20;

}  // namespace

ZeroedPages::ZeroedPages(size_t bytes) {
  if (bytes == 0) return;
  // Less than one huge page is not worth the room that its alignment takes.
  const size_t slack = bytes < kHugePage ? 0 : kHugePage;
  void* map =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (map == MAP_FAILED) return;
  map_ = map;
  mapped_ = bytes + slack;
  data_ = map;
  if (slack == 0) return;
  const uintptr_t start = (reinterpret_cast<uintptr_t>(map) + kHugePage - 1) & ~(kHugePage - 1);
  data_ = reinterpret_cast<void*>(start);
  madvise(data_, bytes, MADV_HUGEPAGE);
}

ZeroedPages::~ZeroedPages() {
  if (map_ != nullptr) munmap(map_, mapped_);
}

void ZeroedPages::swap(ZeroedPages& other) {
  std::swap(map_, other.map_);
  std::swap(mapped_, other.mapped_);
  std::swap(data_, other.data_);
}

}  // namespace thicken
