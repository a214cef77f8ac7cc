#include <napi.h>

#include "bind/args.h"
#include "task.h"

namespace thicken {

static void exportClass(Napi::Object exports, const char* name, Napi::Function constructor,
                        Napi::FunctionReference* kept) {
  *kept = Napi::Persistent(constructor);
  exports.Set(name, constructor);
}

static Napi::Object init(Napi::Env env, Napi::Object exports) {
  auto* data = new AddonData(env);
  env.SetInstanceData(data);
  env.AddCleanupHook([](AddonData* ending) { ending->pool.stop(); }, data);

  exportClass(exports, "CancelFlag", CancelFlagObject::define(env), &data->cancelFlagClass);
  exportClass(exports, "OpenGate", OpenGateObject::define(env), &data->openGateClass);
  exportClass(exports, "Qcow2Tables", Qcow2TablesObject::define(env), &data->qcow2TablesClass);
  exportClass(exports, "Qcow2Session", Qcow2SessionObject::define(env), &data->qcow2SessionClass);
  exportExtents(env, exports);
  exportAllocate(env, exports);
  exportDevice(env, exports);
  exportFile(env, exports);
  exportLock(env, exports);
  exportPeer(env, exports);
  exportQcow2(env, exports);
  exportQcow2Allocate(env, exports);
  return exports;
}

NODE_API_MODULE(thicken, init)

}  // namespace thicken
