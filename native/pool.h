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

/// One piece of native work: `run` on a pool thread, then `settle` on the JavaScript thread.
class Task {
 public:
  explicit Task(std::shared_ptr<CancelFlag> cancel) : cancel_(std::move(cancel)) {}
  virtual ~Task() = default;

  virtual void run() = 0;
  virtual void settle(Napi::Env env) = 0;

  CancelFlag& cancel() { return *cancel_; }

 private:
  std::shared_ptr<CancelFlag> cancel_;
};

class Pool;
void deliverTask(Napi::Env env, Napi::Function, Pool* pool, Task* task);

/// The threads of one JavaScript environment. Its own, so that long fallocate calls never starve
/// libuv's four; started with the first task.
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
  std::unique_ptr<Task> takeNext();
  void finish(std::unique_ptr<Task> task);

  Delivery delivery_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::unique_ptr<Task>> queue_;
  std::unordered_set<Task*> running_;
  std::vector<std::thread> threads_;
  bool stopping_ = false;
  size_t outstanding_ = 0;  // JavaScript thread only: submitted and not yet settled
};

}  // namespace thicken
