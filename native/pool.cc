#include "pool.h"

#include <system_error>

#include "signals.h"

namespace thicken {
namespace {

// Two to four large writes in flight saturate a disk (measured); more would only queue there.
constexpr size_t kThreads = 4;

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
  wake_.notify_one();
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
  while (std::unique_ptr<Task> task = takeNext()) {
    task->run();
    finish(std::move(task));
  }
}

std::unique_ptr<Task> Pool::takeNext() {
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
  if (stopping_) return nullptr;
  std::unique_ptr<Task> task = std::move(queue_.front());
  queue_.pop_front();
  running_.insert(task.get());
  return task;
}

void Pool::finish(std::unique_ptr<Task> task) {
  {
    std::lock_guard<std::mutex> guard(mutex_);
    running_.erase(task.get());
    if (stopping_) return;
  }
  Task* delivered = task.release();
  if (delivery_.NonBlockingCall(delivered) != napi_ok) delete delivered;
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
