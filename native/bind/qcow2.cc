#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

using qcow2::Allocator;
using qcow2::Code;
using qcow2::Header;
using qcow2::HostFiles;
using qcow2::Image;
using qcow2::JoinedPage;
using qcow2::Needed;
using qcow2::Outcome;

std::shared_ptr<Qcow2Tables> tablesArg(const Napi::CallbackInfo& info, size_t index) {
  const auto& tables = info.Env().GetInstanceData<AddonData>()->qcow2TablesClass;
  return unwrap<Qcow2TablesObject>(info[index], tables, "expected Qcow2Tables")->tables();
}

// What a header said, of an image that is still open.
std::shared_ptr<const Image> imageArg(const Napi::CallbackInfo& info, size_t index) {
  std::shared_ptr<const Image> image = tablesArg(info, index)->get();
  if (!image) throw Napi::TypeError::New(info.Env(), "the image is closed");
  return image;
}

struct Opened {
  Outcome outcome;
  Outcome writable;
  std::shared_ptr<Image> image = std::make_shared<Image>();
};

// A name is bytes; those that are no UTF-8 come out as replacement characters.
void setName(Napi::Object value, const char* key, const std::string& name) {
  if (name.empty())
    value.Set(key, value.Env().Null());
  else
    value.Set(key, Napi::String::New(value.Env(), name));
}

Napi::Value openedValue(Napi::Env env, const Opened& opened) {
  Napi::Object value = Napi::Object::New(env);
  setOutcome(env, value, opened.outcome);
  Napi::Object writable = Napi::Object::New(env);
  setOutcome(env, writable, opened.writable);
  value.Set("writable", writable);
  const Header& header = opened.image->header;
  const auto set = [&](const char* name, uint64_t number) {
    value.Set(name, static_cast<double>(number));
  };
  set("version", header.version);
  set("clusterSize", opened.image->geometry.clusterSize());
  set("virtualSize", header.virtualSize);
  set("fileSize", opened.image->fileSize);
  set("snapshots", opened.image->snapshots.size());
  set("bitmaps", header.bitmapCount);
  value.Set("encrypted", header.cryptMethod != 0);
  value.Set("extended", opened.image->geometry.extended);
  value.Set("externalData", opened.image->geometry.externalData);
  value.Set("backed", header.hasBacking);
  setName(value, "backingFile", header.backingFile);
  setName(value, "backingFormat", header.backingFormat);
  setName(value, "dataFile", header.dataFile);
  return value;
}

// (tables, fd, cancel?) → facts; reads only
Napi::Value jsOpenQcow2(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 1);
  return queue<Opened>(
      info.Env(), cancelArg(info, 2),
      [fd, tables = tablesArg(info, 0)](Opened* opened, const CancelFlag&) {
        qcow2::FileIo io(fd);
        opened->outcome = qcow2::openImage(io, opened->image.get());
        opened->writable = qcow2::checkWritable(opened->image->header);
        tables->set(opened->outcome.ok() ? opened->image : nullptr);
        return statusOf(opened->outcome);
      },
      openedValue);
}

struct Joined {
  Outcome outcome;
  JoinedPage page;
};

Napi::Value joinedValue(Napi::Env env, const Joined& joined) {
  Napi::Object value = Napi::Object::New(env);
  setOutcome(env, value, joined.outcome);
  setPage(env, value, joined.page);
  value.Set("host", typedArray<Napi::Float64Array>(env, joined.page.host));
  return value;
}

// (tables, files, offset, end, maxExtents, cancel?) → page
Napi::Value jsReadQcow2(const Napi::CallbackInfo& info) {
  const HostFiles files = hostFilesArg(info, 1);
  const PageRequest wanted = pageArg(info, 2);
  const std::shared_ptr<const Image> image = imageArg(info, 0);
  return queue<Joined>(
      info.Env(), cancelArg(info, 5),
      [=](Joined* joined, const CancelFlag& cancel) {
        joined->outcome =
            qcow2::readJoined(*image, files, wanted.range, wanted.most, cancel, &joined->page);
        return statusOf(joined->outcome);
      },
      joinedValue, Bound::processor);
}

struct Preallocated {
  Outcome outcome;
  bool value = false;
};

// (tables, fd, hostBytes, cancel?) → whether clusters have fewer blocks than they take
Napi::Value jsLooksPreallocatedQcow2(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 1);
  const uint64_t hostBytes = bytesOf(info[2]);
  const std::shared_ptr<const Image> image = imageArg(info, 0);
  return queue<Preallocated>(
      info.Env(), cancelArg(info, 3),
      [=](Preallocated* found, const CancelFlag& cancel) {
        qcow2::FileIo io(fd);
        found->outcome = qcow2::looksPreallocated(io, *image, hostBytes, cancel, &found->value);
        return statusOf(found->outcome);
      },
      [](Napi::Env env, const Preallocated& found) {
        return Napi::Boolean::New(env, found.value);
      });
}

struct Measured {
  Outcome outcome;
  uint64_t clusterSize = 0;
  Needed needed;
  uint64_t reserve = 0;
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
  measured->reserve = allocator.reserveInUse();
  return statusOf(measured->outcome);
}

Napi::Value measuredValue(Napi::Env env, const Measured& measured) {
  Napi::Object value = Napi::Object::New(env);
  const auto set = [&](const char* name, uint64_t bytes) {
    value.Set(name, Napi::Number::New(env, static_cast<double>(bytes)));
  };
  setOutcome(env, value, measured.outcome);
  set("clusterSize", measured.clusterSize);
  set("fileEnd", measured.needed.fileEnd);
  set("reserve", measured.reserve * measured.clusterSize);
  set("marked", measured.needed.marked * measured.clusterSize);
  set("bare", measured.needed.bare * measured.clusterSize);
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

Napi::Function Qcow2TablesObject::define(Napi::Env env) {
  return DefineClass(env, "Qcow2Tables", {InstanceMethod<&Qcow2TablesObject::close>("close")});
}

HostFiles hostFilesArg(const Napi::CallbackInfo& info, size_t index) {
  constexpr uint64_t kMethods = 4;
  const Napi::Object object = objectArg(info, index);
  const uint64_t method = bytesField(object, "method");
  const uint64_t dataMethod = bytesField(object, "dataMethod");
  if (method >= kMethods || dataMethod >= kMethods)
    throw Napi::RangeError::New(info.Env(), "unknown method");
  return HostFiles{descriptorField(object, "fd"), static_cast<ExtentMethod>(method),
                   descriptorField(object, "dataFd"), static_cast<ExtentMethod>(dataMethod)};
}

Status statusOf(const Outcome& outcome) {
  return outcome.code == Code::io ? outcome.status : Status{};
}

void setOutcome(Napi::Env env, Napi::Object value, const Outcome& outcome) {
  value.Set("code", qcow2::codeName(outcome.code));
  value.Set("message", Napi::String::New(env, outcome.message));
  value.Set("at", static_cast<double>(outcome.status.offset));
  value.Set("size", static_cast<double>(outcome.status.length));
}

void exportQcow2(Napi::Env env, Napi::Object exports) {
  exports.Set("openQcow2", Napi::Function::New(env, jsOpenQcow2));
  exports.Set("readQcow2", Napi::Function::New(env, jsReadQcow2));
  exports.Set("looksPreallocatedQcow2", Napi::Function::New(env, jsLooksPreallocatedQcow2));
  exports.Set("measureQcow2", Napi::Function::New(env, jsMeasureQcow2));
}

}  // namespace thicken
