#include "../extents.h"

#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

constexpr size_t kMostExtents = 1u << 20;

Napi::Value pageValue(Napi::Env env, const ExtentPage& page) {
  Napi::Object value = Napi::Object::New(env);
  value.Set("offset", typedArray<Napi::Float64Array>(env, page.offset));
  value.Set("length", typedArray<Napi::Float64Array>(env, page.length));
  value.Set("state", typedArray<Napi::Uint8Array>(env, page.state));
  value.Set("flags", typedArray<Napi::Uint32Array>(env, page.flags));
  value.Set("next", static_cast<double>(page.next));
  return value;
}

// (fd, method, offset, end, maxExtents, cancel?) → page
Napi::Value jsReadExtents(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  const int fd = descriptorArg(info, 0);
  const auto method = static_cast<ExtentMethod>(codeArg(info, 1, 4));
  const uint64_t offset = bytesOf(info[2]);
  const uint64_t end = bytesOf(info[3]);
  const uint64_t most = bytesOf(info[4]);
  if (end < offset || most < 1 || most > kMostExtents)
    throw Napi::RangeError::New(env, "expected offset <= end and 1 to 2^20 extents");
  return queue<ExtentPage>(
      env, cancelArg(info, 5),
      [=](ExtentPage* page, const CancelFlag& cancel) {
        return readExtents(fd, method, Range{offset, end - offset}, most, cancel, page);
      },
      pageValue);
}

}  // namespace

void exportExtents(Napi::Env env, Napi::Object exports) {
  exports.Set("readExtents", Napi::Function::New(env, jsReadExtents));
}

}  // namespace thicken
