#include "../peer.h"

#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

// (fd) → credentials; at once, since the kernel answers from memory
Napi::Value jsPeerCredentials(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  PeerCredentials peer;
  const Status status = readPeer(descriptorArg(info, 0), &peer);
  if (!status.ok()) throw errorOf(env, status);
  Napi::Object value = Napi::Object::New(env);
  value.Set("pid", Napi::Number::New(env, static_cast<double>(peer.pid)));
  value.Set("uid", Napi::Number::New(env, peer.uid));
  value.Set("gid", Napi::Number::New(env, peer.gid));
  return value;
}

}  // namespace

void exportPeer(Napi::Env env, Napi::Object exports) {
  exports.Set("peerCredentials", Napi::Function::New(env, jsPeerCredentials));
}

}  // namespace thicken
