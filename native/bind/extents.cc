#include "../extents.h"

#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

Napi::Value pageValue(Napi::Env env, const ExtentPage& page) {
  Napi::Object value = Napi::Object::New(env);
  setPage(env, value, page);
  return value;
}

// (fd, method, offset, end, maxExtents, cancel?) → page
Napi::Value jsReadExtents(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  const auto method = static_cast<ExtentMethod>(codeArg(info, 1, 4));
  const PageRequest wanted = pageArg(info, 2);
  return queue<ExtentPage>(
      info.Env(), cancelArg(info, 5),
      [=](ExtentPage* page, const CancelFlag& cancel) {
        return readExtents(fd, method, wanted.range, wanted.most, cancel, page);
      },
      pageValue, Bound::processor);
}

}  // namespace

void exportExtents(Napi::Env env, Napi::Object exports) {
  exports.Set("readExtents", Napi::Function::New(env, jsReadExtents));
}

}  // namespace thicken
