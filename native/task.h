#pragma once

#include <napi.h>

#include <cstring>
#include <memory>
#include <utility>

#include "pool.h"
#include "status.h"

namespace thicken {

/// What one JavaScript environment owns.
struct AddonData {
  explicit AddonData(Napi::Env env) : pool(env) {}

  Pool pool;
  Napi::FunctionReference cancelFlagClass;
  Napi::FunctionReference openGateClass;
  Napi::FunctionReference qcow2TablesClass;
  Napi::FunctionReference qcow2SessionClass;
};

inline Napi::Error errorOf(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, std::strerror(status.error));
  error.Set("errno", Napi::Number::New(env, status.error));
  error.Set("syscall", Napi::String::New(env, status.syscall));
  error.Set("offset", Napi::Number::New(env, static_cast<double>(status.offset)));
  error.Set("length", Napi::Number::New(env, static_cast<double>(status.length)));
  return error;
}

/// Runs `run(Result*, const CancelFlag&) -> Status` on the pool and settles a promise with
/// `toValue(Napi::Env, const Result&)`, or with an error that carries errno, syscall and range.
/// Only plain data crosses threads: neither callable may hold a JavaScript value.
template <typename Result, typename Run, typename ToValue>
class PromiseTask final : public Task {
 public:
  PromiseTask(Napi::Env env, std::shared_ptr<CancelFlag> cancel, Bound bound, Run run,
              ToValue toValue)
      : Task(std::move(cancel), bound),
        deferred_(Napi::Promise::Deferred::New(env)),
        run_(std::move(run)),
        toValue_(std::move(toValue)) {}

  Napi::Promise promise() const { return deferred_.Promise(); }

  void run() override {
    try {
      status_ = run_(&result_, cancel());
    } catch (const std::bad_alloc&) {
      status_ = Status{ENOMEM, "malloc"};
    }
  }

  void settle(Napi::Env env) override {
    Napi::HandleScope scope(env);
    // A failed run has a result too: how far it came.
    Napi::Value value = toValue_(env, result_);
    if (status_.ok()) return deferred_.Resolve(value);
    Napi::Error error = errorOf(env, status_);
    error.Set("partial", value);
    deferred_.Reject(error.Value());
  }

 private:
  Napi::Promise::Deferred deferred_;
  Run run_;
  ToValue toValue_;
  Result result_{};
  Status status_;
};

template <typename Result, typename Run, typename ToValue>
Napi::Promise queue(Napi::Env env, std::shared_ptr<CancelFlag> cancel, Run run, ToValue toValue,
                    Bound bound = Bound::storage) {
  using Concrete = PromiseTask<Result, Run, ToValue>;
  auto task =
      std::make_unique<Concrete>(env, std::move(cancel), bound, std::move(run), std::move(toValue));
  Napi::Promise promise = task->promise();
  env.GetInstanceData<AddonData>()->pool.submit(env, std::move(task));
  return promise;
}

}  // namespace thicken
