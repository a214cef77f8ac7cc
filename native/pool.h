#pragma once

#include <napi.h>

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <vector>

#include "cancel.h"

namespace thicken {

/// What a task mostly waits for.
enum class Bound { storage, processor };

/// One piece of native work: `run` on a pool thread, then `settle` on the JavaScript thread.
class Task {
 public:
  Task(std::shared_ptr<CancelFlag> cancel, Bound bound)
      : cancel_(std::move(cancel)), bound_(bound) {}
  virtual ~Task() = default;

  virtual void run() = 0;
  virtual void settle(Napi::Env env) = 0;

  CancelFlag& cancel() { return *cancel_; }
  Bound bound() const { return bound_; }

 private:
  std::shared_ptr<CancelFlag> cancel_;
  Bound bound_;
};

class Pool;
void deliverTask(Napi::Env env, Napi::Function, Pool* pool, Task* task);

/// The threads of one JavaScript environment. Its own, so that long fallocate calls never starve
/// libuv's four; started with the first task. Tasks start in the order that they came in, but of
/// those that processors hold up no more at once than there are processors: on two of them, four
/// threads in FIEMAP of one file took 1.2 times as long as two (ext4, Linux 6.18).
///
/// Life: stop() runs as an environment cleanup hook, added after the thread-safe function was made
/// and so called before that one's own hook. It cancels what runs, joins the threads, and lets go
/// of what was not started: no thread outlives the environment, and none calls into it while it
/// ends.
class Pool {
 public:
  explicit Pool(Napi::Env env);
  ~Pool() { stop(); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void submit(Napi::Env env, std::unique_ptr<Task> task);
  void stop();

 private:
  friend void deliverTask(Napi::Env env, Napi::Function, Pool* pool, Task* task);
  using Delivery = Napi::TypedThreadSafeFunction<Pool, Task, deliverTask>;

  void work();
  void startThreads();
  std::deque<std::unique_ptr<Task>>::iterator firstToStart();
  std::unique_ptr<Task> takeNext();
  std::unique_ptr<Task> waitForNext();
  /// Delivers `task`, and takes the next one at once: otherwise another thread would be woken for
  /// it, and what this one has in its processor's cache would be lost.
  std::unique_ptr<Task> finish(std::unique_ptr<Task> task);

  Delivery delivery_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::unique_ptr<Task>> queue_;
  std::unordered_set<Task*> running_;
  size_t computing_ = 0;  // of those, the ones that processors hold up
  std::vector<std::thread> threads_;
  bool stopping_ = false;
  size_t outstanding_ = 0;  // JavaScript thread only: submitted and not yet settled
};

}  // namespace thicken
