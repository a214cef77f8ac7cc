#pragma once

#include <cstddef>

namespace thicken {

/// Memory for large tables that are gone through once: zeros, in huge pages where the kernel has
/// them (madvise(2), MADV_HUGEPAGE). Small pages, 4 KiB at a time, took longer to get than what is
/// done with them.
class ZeroedPages {
 public:
  ZeroedPages() = default;
  explicit ZeroedPages(size_t bytes);
  ~ZeroedPages();
  ZeroedPages(ZeroedPages&& other) noexcept { swap(other); }
  ZeroedPages& operator=(ZeroedPages&& other) noexcept {
    swap(other);
    return *this;
  }
  ZeroedPages(const ZeroedPages&) = delete;
  ZeroedPages& operator=(const ZeroedPages&) = delete;

  /// nullptr where there is no memory, or none was asked for.
  void* data() const { return data_; }

 private:
  void swap(ZeroedPages& other);

  void* map_ = nullptr;
  size_t mapped_ = 0;
  void* data_ = nullptr;
};

}  // namespace thicken
