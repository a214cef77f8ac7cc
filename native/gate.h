#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "cancel.h"
#include "notices.h"
#include "status.h"

namespace thicken {

/// Stands between the zeros that are about to be written to a file or device, and whoever opens it
/// meanwhile.
///
/// With fanotify(7) permission events (CAP_SYS_ADMIN), an open waits until no write is in flight,
/// and no further one starts before `settle`: whoever opened has then been looked at. Without, an
/// open is told after the fact (OpenNotices): the next write does not start, but one in flight may
/// overlap with what the opener does.
class OpenGate {
 public:
  OpenGate();
  ~OpenGate();
  OpenGate(const OpenGate&) = delete;
  OpenGate& operator=(const OpenGate&) = delete;

  /// Watches one more inode: that of an open file or device node. Until then, the gate is open.
  Status watch(int fd);

  /// Whether a write may start; if so, leave() must follow it.
  bool enter();
  void leave();

  /// Forgets the opens so far.
  void reset();
  /// Opens what `fd` has open once more, as an open that settle() allows for. A foreign lease is
  /// waited for. One that failed may make settle() say no: not every open that is refused is told
  /// of. From one thread at a time. `opened` is closed by closeOpened(), or with the gate.
  Status open(int fd, int flags, const CancelFlag& cancel, int* opened);
  Status closeOpened(int fd);
  /// Opens the gate again if there was no open since reset() but those by open().
  bool settle();
  /// Whether somebody has opened since reset() or settle().
  bool disturbed();
  /// Whether opens wait for writes in flight.
  bool holdsOpens() const { return fanotify_ >= 0; }
  /// Whether own opens are told from foreign ones. If not, a foreign one that comes within the
  /// system call of an own one may go unseen: settle() says no after one that took long, unless
  /// all do.
  bool knowsOpeners() const { return holdsOpens() || notices_->knowOpeners(); }

 private:
  void startWatcher();
  void watchOpens();
  void readPermissionEvents();
  void admit(int eventFd, bool own);
  void readNotices();
  Status openOnce(const char* path, int flags, int* opened);
  void countOwn(uint64_t opens, std::chrono::steady_clock::time_point begin);
  bool mayHideOne(std::chrono::steady_clock::time_point begin);

  int fanotify_ = -1;
  int stop_ = -1;
  /// Where there are no permission events.
  std::unique_ptr<OpenNotices> notices_;
  std::thread watcher_;
  std::mutex mutex_;
  std::condition_variable drained_;
  /// Opens of this process, and how many of them there must be.
  uint64_t own_ = 0;
  uint64_t expected_ = 0;
  uint64_t foreign_ = 0;
  uint64_t inside_ = 0;
  unsigned slowOpens_ = 0;
  std::unordered_set<int> opened_;
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
