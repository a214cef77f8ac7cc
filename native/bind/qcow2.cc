#include "../qcow2/allocate.h"
#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

using qcow2::Allocator;
using qcow2::Code;
using qcow2::Image;
using qcow2::Needed;
using qcow2::Outcome;

struct Measured {
  Outcome outcome;
  uint64_t clusterSize = 0;
  Needed needed;
};

Status measure(int fd, const CancelFlag& cancel, Measured* measured) {
  qcow2::FileIo io(fd);
  Image image;
  measured->outcome = qcow2::openImage(io, &image);
  if (!measured->outcome.ok()) return measured->outcome.status;
  measured->clusterSize = image.geometry.clusterSize();
  Allocator allocator(io, nullptr, image);
  // All of the disk, as if nothing came from a backing file: every cluster may have to be mapped.
  qcow2::Request request;
  request.range = Range{0, image.geometry.virtualSize};
  request.backingEnd = 0;
  bool cancelled = false;
  measured->outcome = allocator.prepare(request, cancel, &cancelled);
  measured->needed = allocator.needed();
  return measured->outcome.code == Code::io ? measured->outcome.status : Status{};
}

Napi::Value measuredValue(Napi::Env env, const Measured& measured) {
  Napi::Object value = Napi::Object::New(env);
  const auto set = [&](const char* name, uint64_t bytes) {
    value.Set(name, Napi::Number::New(env, static_cast<double>(bytes)));
  };
  value.Set("code", qcow2::codeName(measured.outcome.code));
  value.Set("message", measured.outcome.message);
  set("clusterSize", measured.clusterSize);
  set("fileEnd", measured.needed.fileEnd);
  set("reserve", measured.needed.reserve * measured.clusterSize);
  return value;
}

// (fd, cancel?) → what full allocation takes; reads only
Napi::Value jsMeasureQcow2(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  return queue<Measured>(
      info.Env(), cancelArg(info, 1),
      [=](Measured* measured, const CancelFlag& cancel) { return measure(fd, cancel, measured); },
      measuredValue);
}

}  // namespace

void exportQcow2(Napi::Env env, Napi::Object exports) {
  exports.Set("measureQcow2", Napi::Function::New(env, jsMeasureQcow2));
}

}  // namespace thicken
