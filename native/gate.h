#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "status.h"

namespace thicken {

/// Stands between the zeros that are about to be written to a file or device, and whoever opens it
/// meanwhile.
///
/// With fanotify(7) permission events (CAP_SYS_ADMIN), an open waits until no write is in flight,
/// and no further one starts before `settle`: whoever opened has then been looked at. Without,
/// inotify(7) tells of an open after the fact: the next write does not start, but one in flight
/// may overlap with what the opener does.
class OpenGate {
 public:
  /// Where neither mechanism works, the gate stays open.
  OpenGate();
  ~OpenGate();
  OpenGate(const OpenGate&) = delete;
  OpenGate& operator=(const OpenGate&) = delete;

  /// Watches one more inode: that of an open file or device node.
  Status watch(int fd);

  /// Whether a write may start; if so, leave() must follow it.
  bool enter();
  void leave();

  /// Forgets the opens so far.
  void reset();
  /// Opens the gate again if there were exactly `own` opens since reset(), all of this process.
  bool settle(uint64_t own);
  /// Whether somebody has opened since reset() or settle().
  bool disturbed();
  /// Whether opens wait for writes in flight.
  bool holdsOpens() const { return fanotify_ >= 0; }

 private:
  void startWatcher();
  void watchOpens();
  void readPermissionEvents();
  void admit(int eventFd, bool own);
  void readNotices();

  int fanotify_ = -1;
  int inotify_ = -1;
  int stop_ = -1;
  std::thread watcher_;
  std::mutex mutex_;
  std::condition_variable drained_;
  uint64_t own_ = 0;
  uint64_t foreign_ = 0;
  uint64_t inside_ = 0;
};

/// One write's way through a gate; without a gate it is always granted.
class GatePass {
 public:
  explicit GatePass(OpenGate* gate) : gate_(gate), granted_(gate == nullptr || gate->enter()) {}
  ~GatePass() {
    if (gate_ != nullptr && granted_) gate_->leave();
  }
  GatePass(const GatePass&) = delete;
  GatePass& operator=(const GatePass&) = delete;

  bool granted() const { return granted_; }

 private:
  OpenGate* gate_;
  bool granted_;
};

}  // namespace thicken
