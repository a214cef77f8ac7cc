#include "zero.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>

namespace thicken {
namespace {

typedef uint64_t Vector __attribute__((vector_size(32)));
constexpr size_t kVectors = 4;
constexpr size_t kStride = kVectors * sizeof(Vector);

}  // namespace

bool isZero(const void* data, size_t length) {
  const auto* at = static_cast<const unsigned char*>(data);
  const auto* end = at + length;
  for (; static_cast<size_t>(end - at) >= kStride; at += kStride) {
    // The data may lie at any address; the copy becomes unaligned loads.
    Vector v[kVectors];
    std::memcpy(v, at, sizeof v);
    const Vector any = v[0] | v[1] | v[2] | v[3];
    if ((any[0] | any[1] | any[2] | any[3]) != 0) return false;
  }
  for (; at < end; at++)
    if (*at != 0) return false;
  return true;
}

uint64_t findZeroRuns(const void* data, size_t length, size_t granularity, uint64_t base,
                      std::vector<Range>* runs) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  uint64_t found = 0;
  for (size_t at = 0; at < length; at += granularity) {
    const size_t unit = std::min(granularity, length - at);
    if (!isZero(bytes + at, unit)) continue;
    found += unit;
    if (!runs->empty() && runs->back().end() == base + at)
      runs->back().length += unit;
    else
      runs->push_back(Range{base + at, unit});
  }
  return found;
}

const void* zeroBuffer() {
  static const void* buffer = []() -> void* {
    constexpr size_t kHugePage = 2u << 20;
    void* map = mmap(nullptr, kZeroBufferSize + kHugePage, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    const uintptr_t start = (reinterpret_cast<uintptr_t>(map) + kHugePage - 1) & ~(kHugePage - 1);
    void* aligned = reinterpret_cast<void*>(start);
    // Contiguous memory makes few and large block requests of a direct write; touching it here
    // gives it pages of its own, where an untouched mapping would repeat the kernel's zero page.
    madvise(aligned, kZeroBufferSize, MADV_HUGEPAGE);
    std::memset(aligned, 0, kZeroBufferSize);
    // No code can ever scribble over what is written to disks.
    if (mprotect(aligned, kZeroBufferSize, PROT_READ) != 0) return nullptr;
    return aligned;
  }();
  return buffer;
}

}  // namespace thicken
