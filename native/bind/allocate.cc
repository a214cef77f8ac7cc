#include "../allocate.h"

#include "../io.h"
#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

// (fd, mode, expectedSize, rangesPerCall, ranges, cancel?) → work
Napi::Value jsFallocate(const Napi::CallbackInfo& info) {
  Fallocate options;
  options.fd = descriptorArg(info, 0);
  options.mode = static_cast<FallocateMode>(codeArg(info, 1, 2));
  options.expectedSize = bytesOf(info[2]);
  options.rangesPerCall = static_cast<size_t>(bytesOf(info[3]));
  if (options.rangesPerCall == 0)
    throw Napi::RangeError::New(info.Env(), "a call takes at least 1 range");
  return queue<Work>(
      info.Env(), cancelArg(info, 5),
      [options, ranges = rangesArg(info, 4)](Work* work, const CancelFlag& cancel) {
        return fallocateRanges(options, ranges, cancel, work);
      },
      workValue);
}

ZeroWrite zeroWriteArg(const Napi::CallbackInfo& info, size_t index) {
  const Napi::Object object = objectArg(info, index);
  ZeroWrite options;
  options.bufferedFd = object.Get("bufferedFd").ToNumber().Int32Value();
  options.directFd = object.Get("directFd").ToNumber().Int32Value();
  options.directAlignment = bytesField(object, "directAlignment");
  options.directMinimum = bytesField(object, "directMinimum");
  options.granularity = bytesField(object, "granularity");
  options.expectedSize = bytesField(object, "expectedSize");
  options.settle.offset = bytesField(object, "settleOffset");
  options.settle.length = bytesField(object, "settleLength");
  if (options.granularity == 0 || options.granularity > kScratchSize)
    throw Napi::RangeError::New(info.Env(), "granularity must be 1 byte to 1 MiB");
  return options;
}

std::shared_ptr<OpenGate> gateOf(const Napi::CallbackInfo& info, size_t index) {
  return gateArg(static_cast<Napi::Value>(info[index].As<Napi::Object>().Get("gate")));
}

// (options, ranges, cancel?) → work
Napi::Value jsZeroWrite(const Napi::CallbackInfo& info) {
  return queue<Work>(
      info.Env(), cancelArg(info, 2),
      [options = zeroWriteArg(info, 0), gate = gateOf(info, 0), ranges = rangesArg(info, 1)](
          Work* work, const CancelFlag& cancel) mutable {
        options.gate = gate.get();
        return zeroWriteRanges(options, ranges, cancel, work);
      },
      workValue);
}

}  // namespace

void exportAllocate(Napi::Env env, Napi::Object exports) {
  exports.Set("fallocate", Napi::Function::New(env, jsFallocate));
  exports.Set("zeroWrite", Napi::Function::New(env, jsZeroWrite));
}

}  // namespace thicken
