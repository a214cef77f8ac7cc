#include "../file.h"

#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

// (fd) → facts; inodeFlags is null where the file system has none
Napi::Value jsFileFacts(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<FileFacts>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd](FileFacts* facts, const CancelFlag&) { return readFileFacts(fd, facts); },
      [](Napi::Env env, const FileFacts& facts) {
        Napi::Object value = Napi::Object::New(env);
        value.Set("blockSize", facts.blockSize);
        value.Set("inodeFlags", facts.hasInodeFlags ? Napi::Number::New(env, facts.inodeFlags)
                                                    : Napi::Value(env.Null()));
        value.Set("directMemory", facts.directMemory);
        value.Set("directOffset", facts.directOffset);
        return value;
      });
}

struct Nothing {};

// (fd, scope)
Napi::Value jsSyncFile(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  const auto scope = static_cast<SyncScope>(codeArg(info, 1, 3));
  return queue<Nothing>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd, scope](Nothing*, const CancelFlag&) { return syncFile(fd, scope); },
      [](Napi::Env env, const Nothing&) { return env.Undefined(); });
}

// (fd) → bytes left, or null where there is no limit
Napi::Value jsBtrfsQuota(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<QuotaFacts>(
      info.Env(), std::make_shared<CancelFlag>(),
      [fd](QuotaFacts* facts, const CancelFlag&) { return readBtrfsQuota(fd, facts); },
      [](Napi::Env env, const QuotaFacts& facts) -> Napi::Value {
        if (!facts.limited) return env.Null();
        return Napi::Number::New(env, static_cast<double>(facts.available));
      });
}

}  // namespace

void exportFile(Napi::Env env, Napi::Object exports) {
  exports.Set("fileFacts", Napi::Function::New(env, jsFileFacts));
  exports.Set("syncFile", Napi::Function::New(env, jsSyncFile));
  exports.Set("btrfsQuota", Napi::Function::New(env, jsBtrfsQuota));
}

}  // namespace thicken
