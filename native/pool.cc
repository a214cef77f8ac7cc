#include "pool.h"

#include <algorithm>
#include <system_error>

#include "signals.h"

namespace thicken {
namespace {

// Two to four large writes in flight saturate a disk (measured); more would only queue there.
constexpr size_t kThreads = 4;

// Two at least: the extents of a file may have to be fetched from its disk.
size_t processors() { return std::max(2u, std::thread::hardware_concurrency()); }

}  // namespace

Pool::Pool(Napi::Env env) : delivery_(Delivery::New(env, "thicken", 0, 1, this)) {
  delivery_.Unref(env);
}

void Pool::submit(Napi::Env env, std::unique_ptr<Task> task) {
  std::lock_guard<std::mutex> guard(mutex_);
  if (threads_.empty()) startThreads();
  if (threads_.empty()) throw Napi::Error::New(env, "no thread could be started");
  if (outstanding_++ == 0) delivery_.Ref(env);
  queue_.push_back(std::move(task));
  // Otherwise the thread that ends a task takes it: one that is woken in vain costs it a switch.
  if (firstToStart() != queue_.end()) wake_.notify_one();
}

void Pool::startThreads() {
  SignalsBlocked blocked;
  try {
    while (threads_.size() < kThreads) threads_.emplace_back([this] { work(); });
  } catch (const std::system_error&) {
    // Fewer do as well.
  }
}

void Pool::work() {
  std::unique_ptr<Task> task = waitForNext();
  while (task) {
    task->run();
    std::unique_ptr<Task> next = finish(std::move(task));
    task = next ? std::move(next) : waitForNext();
  }
}

std::deque<std::unique_ptr<Task>>::iterator Pool::firstToStart() {
  static const size_t most = processors();
  if (computing_ < most) return queue_.begin();
  return std::find_if(queue_.begin(), queue_.end(), [](const std::unique_ptr<Task>& task) {
    return task->bound() != Bound::processor;
  });
}

std::unique_ptr<Task> Pool::takeNext() {
  const auto next = firstToStart();
  if (stopping_ || next == queue_.end()) return nullptr;
  std::unique_ptr<Task> task = std::move(*next);
  queue_.erase(next);
  running_.insert(task.get());
  if (task->bound() == Bound::processor) computing_++;
  return task;
}

std::unique_ptr<Task> Pool::waitForNext() {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [this] { return stopping_ || firstToStart() != queue_.end(); });
  return takeNext();
}

std::unique_ptr<Task> Pool::finish(std::unique_ptr<Task> task) {
  std::unique_ptr<Task> next;
  {
    std::lock_guard<std::mutex> guard(mutex_);
    running_.erase(task.get());
    if (task->bound() == Bound::processor) computing_--;
    if (stopping_) return nullptr;
    next = takeNext();
  }
  Task* delivered = task.release();
  if (delivery_.NonBlockingCall(delivered) != napi_ok) delete delivered;
  return next;
}

void Pool::stop() {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    if (stopping_) return;
    stopping_ = true;
    for (Task* task : running_) task->cancel().set();
    queue_.clear();
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  delivery_.Abort();
}

void deliverTask(Napi::Env env, Napi::Function, Pool* pool, Task* task) {
  std::unique_ptr<Task> owned(task);
  // Without an environment, Node empties the queue of a function that is being torn down; the
  // pool may be gone by then.
  if (static_cast<napi_env>(env) == nullptr) return;
  if (--pool->outstanding_ == 0) pool->delivery_.Unref(env);
  owned->settle(env);
}

}  // namespace thicken
