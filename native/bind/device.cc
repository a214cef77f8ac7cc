#include "../device.h"

#include "../io.h"
#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

// (fd) → facts
Napi::Value jsDeviceFacts(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<DeviceFacts>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd](DeviceFacts* facts, const CancelFlag&) { return readDeviceFacts(fd, facts); },
      [](Napi::Env env, const DeviceFacts& facts) {
        Napi::Object value = Napi::Object::New(env);
        value.Set("size", static_cast<double>(facts.size));
        value.Set("logicalSector", facts.logicalSector);
        value.Set("physicalSector", facts.physicalSector);
        value.Set("readOnly", facts.readOnly);
        return value;
      });
}

// (fd) → facts, or null where it is no loop device
Napi::Value jsLoopFacts(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<LoopFacts>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd](LoopFacts* facts, const CancelFlag&) { return readLoopFacts(fd, facts); },
      [](Napi::Env env, const LoopFacts& facts) -> Napi::Value {
        if (!facts.isLoop) return env.Null();
        Napi::Object value = Napi::Object::New(env);
        value.Set("device", static_cast<double>(facts.device));
        value.Set("inode", static_cast<double>(facts.inode));
        value.Set("blockDevice", static_cast<double>(facts.blockDevice));
        value.Set("offset", static_cast<double>(facts.offset));
        value.Set("sizeLimit", static_cast<double>(facts.sizeLimit));
        return value;
      });
}

// (fd, mode, granularity, gate, ranges, cancel?) → work
Napi::Value jsAllocateDevice(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  const auto mode = static_cast<DeviceMode>(codeArg(info, 1, 2));
  const uint64_t granularity = bytesOf(info[2]);
  if (granularity == 0 || granularity > kScratchSize)
    throw Napi::RangeError::New(info.Env(), "granularity must be 1 byte to 1 MiB");
  return queue<Work>(
      info.Env(), cancelArg(info, 5),
      [fd, mode, granularity, gate = gateArg(info[3]), ranges = rangesArg(info, 4)](
          Work* work, const CancelFlag& cancel) {
        return allocateDeviceRanges(fd, mode, granularity, gate.get(), ranges, cancel, work);
      },
      workValue);
}

}  // namespace

void exportDevice(Napi::Env env, Napi::Object exports) {
  exports.Set("deviceFacts", Napi::Function::New(env, jsDeviceFacts));
  exports.Set("loopFacts", Napi::Function::New(env, jsLoopFacts));
  exports.Set("allocateDevice", Napi::Function::New(env, jsAllocateDevice));
}

}  // namespace thicken
