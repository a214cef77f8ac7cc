#include "../lock.h"

#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

struct Nothing {};

template <typename Operation>
Napi::Value setLocks(const Napi::CallbackInfo& info, Operation operation) {
  const int fd = descriptorArg(info, 0);
  return queue<Nothing>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd, operation, bytes = listArg(info, 1)](Nothing*, const CancelFlag&) {
        return operation(fd, bytes);
      },
      [](Napi::Env env, const Nothing&) { return env.Undefined(); });
}

// (fd, bytes)
Napi::Value jsTakeLocks(const Napi::CallbackInfo& info) { return setLocks(info, takeLocks); }
Napi::Value jsReleaseLocks(const Napi::CallbackInfo& info) { return setLocks(info, releaseLocks); }

// (fd, bytes) → those that somebody else holds
Napi::Value jsProbeLocks(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<std::vector<uint64_t>>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd, bytes = listArg(info, 1)](std::vector<uint64_t>* held, const CancelFlag&) {
        return probeLocks(fd, bytes, held);
      },
      [](Napi::Env env, const std::vector<uint64_t>& held) {
        Napi::Array value = Napi::Array::New(env, held.size());
        for (size_t i = 0; i < held.size(); i++)
          value.Set(static_cast<uint32_t>(i), static_cast<double>(held[i]));
        return value;
      });
}

// (fd) → boolean
Napi::Value jsProbeWriter(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<bool>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd](bool* writer, const CancelFlag&) { return probeWriter(fd, writer); },
      [](Napi::Env env, const bool& writer) { return Napi::Boolean::New(env, writer); });
}

}  // namespace

void exportLock(Napi::Env env, Napi::Object exports) {
  exports.Set("takeLocks", Napi::Function::New(env, jsTakeLocks));
  exports.Set("releaseLocks", Napi::Function::New(env, jsReleaseLocks));
  exports.Set("probeLocks", Napi::Function::New(env, jsProbeLocks));
  exports.Set("probeWriter", Napi::Function::New(env, jsProbeWriter));
}

}  // namespace thicken
