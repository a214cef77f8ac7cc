#pragma once

#include <napi.h>

#include <memory>
#include <vector>

#include "../cancel.h"
#include "../gate.h"
#include "../status.h"

namespace thicken {

// Arguments come from lib/native.ts alone, which has checked what users gave. What is checked here
// is what would otherwise be undefined behaviour.

int descriptorArg(const Napi::CallbackInfo& info, size_t index);
uint64_t bytesOf(Napi::Value value);
uint32_t codeArg(const Napi::CallbackInfo& info, size_t index, uint32_t limit);

/// A Float64Array of offset, length, offset, length, ….
std::vector<Range> rangesArg(const Napi::CallbackInfo& info, size_t index);

/// An array of lock bytes.
std::vector<uint64_t> listArg(const Napi::CallbackInfo& info, size_t index);

/// A CancelFlag of JavaScript's, or a private one where the argument is absent.
std::shared_ptr<CancelFlag> cancelArg(const Napi::CallbackInfo& info, size_t index);

Napi::Value workValue(Napi::Env env, const Work& work);

/// The JavaScript class of cancel flags: `new CancelFlag()`, `cancel()`.
class CancelFlagObject : public Napi::ObjectWrap<CancelFlagObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit CancelFlagObject(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<CancelFlagObject>(info) {}

  std::shared_ptr<CancelFlag> flag() const { return flag_; }

 private:
  void cancel(const Napi::CallbackInfo&) { flag_->set(); }

  std::shared_ptr<CancelFlag> flag_ = std::make_shared<CancelFlag>();
};

/// A gate of JavaScript's.
std::shared_ptr<OpenGate> gateArg(Napi::Value value);

/// The JavaScript class of gates: `new OpenGate()`, `watch(fd)`, `reset()`, `settle(own)`,
/// `disturbed()`, `close()`. None of them waits.
class OpenGateObject : public Napi::ObjectWrap<OpenGateObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit OpenGateObject(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<OpenGateObject>(info), gate_(std::make_shared<OpenGate>()) {}

  std::shared_ptr<OpenGate> gate() const { return gate_; }

 private:
  OpenGate& open(const Napi::CallbackInfo& info);
  void watch(const Napi::CallbackInfo& info);
  void reset(const Napi::CallbackInfo& info);
  Napi::Value settle(const Napi::CallbackInfo& info);
  Napi::Value disturbed(const Napi::CallbackInfo& info);
  void close(const Napi::CallbackInfo&) { gate_.reset(); }

  std::shared_ptr<OpenGate> gate_;
};

void exportExtents(Napi::Env env, Napi::Object exports);
void exportAllocate(Napi::Env env, Napi::Object exports);
void exportDevice(Napi::Env env, Napi::Object exports);
void exportFile(Napi::Env env, Napi::Object exports);
void exportLock(Napi::Env env, Napi::Object exports);
void exportPeer(Napi::Env env, Napi::Object exports);
void exportQcow2(Napi::Env env, Napi::Object exports);

}  // namespace thicken
