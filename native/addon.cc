#include <napi.h>

#include "bind/args.h"
#include "task.h"

namespace thicken {

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData(env);
  env.SetInstanceData(data);
  env.AddCleanupHook([](AddonData* ending) { ending->pool.stop(); }, data);

  Napi::Function cancelFlag = CancelFlagObject::define(env);
  data->cancelFlagClass = Napi::Persistent(cancelFlag);
  exports.Set("CancelFlag", cancelFlag);
  Napi::Function openGate = OpenGateObject::define(env);
  data->openGateClass = Napi::Persistent(openGate);
  exports.Set("OpenGate", openGate);
  exportExtents(env, exports);
  exportAllocate(env, exports);
  exportDevice(env, exports);
  exportFile(env, exports);
  exportLock(env, exports);
  exportPeer(env, exports);
  exportQcow2(env, exports);
  return exports;
}

NODE_API_MODULE(thicken, init)

}  // namespace thicken
