#pragma once

#include <atomic>

namespace thicken {

/// Polled between bounded pieces of work; set from another thread, never cleared.
class CancelFlag {
 public:
  void set() { flag_.store(true, std::memory_order_relaxed); }
  bool isSet() const { return flag_.load(std::memory_order_relaxed); }

 private:
  std::atomic<bool> flag_{false};
};

}  // namespace thicken
