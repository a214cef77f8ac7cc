#pragma once

#include <napi.h>

#include <cstring>
#include <memory>
#include <mutex>
#include <vector>

#include "../cancel.h"
#include "../gate.h"
#include "../qcow2/allocate.h"
#include "../status.h"

namespace thicken {

// Arguments come from lib/native.ts alone, which has checked what users gave. What is checked here
// is what would otherwise be undefined behaviour.

int descriptorArg(const Napi::CallbackInfo& info, size_t index);
uint64_t bytesOf(Napi::Value value);
uint32_t codeArg(const Napi::CallbackInfo& info, size_t index, uint32_t limit);

/// A Float64Array of offset, length, offset, length, ….
std::vector<Range> rangesArg(const Napi::CallbackInfo& info, size_t index);

/// An array of lock bytes.
std::vector<uint64_t> listArg(const Napi::CallbackInfo& info, size_t index);

/// Which part of an image a page tells, in how many extents at the most.
struct PageRequest {
  Range range;
  size_t most;
};

/// (…, offset, end, maxExtents)
PageRequest pageArg(const Napi::CallbackInfo& info, size_t index);

/// The C++ side of an object of a class of ours.
template <typename Wrap>
Wrap* unwrap(Napi::Value value, const Napi::FunctionReference& kind, const char* expected) {
  if (!value.IsObject() || !value.As<Napi::Object>().InstanceOf(kind.Value()))
    throw Napi::TypeError::New(value.Env(), expected);
  return Wrap::Unwrap(value.As<Napi::Object>());
}

/// A CancelFlag of JavaScript's, or a private one where the argument is absent.
std::shared_ptr<CancelFlag> cancelArg(const Napi::CallbackInfo& info, size_t index);

Napi::Value workValue(Napi::Env env, const Work& work);

/// The JavaScript class of cancel flags: `new CancelFlag()`, `cancel()`.
class CancelFlagObject : public Napi::ObjectWrap<CancelFlagObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit CancelFlagObject(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<CancelFlagObject>(info) {}

  std::shared_ptr<CancelFlag> flag() const { return flag_; }

 private:
  void cancel(const Napi::CallbackInfo&) { flag_->set(); }

  std::shared_ptr<CancelFlag> flag_ = std::make_shared<CancelFlag>();
};

/// A gate of JavaScript's.
std::shared_ptr<OpenGate> gateArg(Napi::Value value);

/// The JavaScript class of gates: `new OpenGate()`, `watch(fd)`, `open(fd, flags)`,
/// `closeOpened(fd)`, `reset()`, `settle()`, `knowsOpeners()`, `disturbed()`, `close()`. What opens
/// or closes is a promise, the rest never waits: a foreign lease may hold up open(), and the kernel
/// close() for 20 ms, until nobody looks at the marks any more (Linux 6).
class OpenGateObject : public Napi::ObjectWrap<OpenGateObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit OpenGateObject(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<OpenGateObject>(info), gate_(std::make_shared<OpenGate>()) {}

  std::shared_ptr<OpenGate> gate() const { return gate_; }

 private:
  const std::shared_ptr<OpenGate>& current(const Napi::CallbackInfo& info);
  void watch(const Napi::CallbackInfo& info);
  Napi::Value open(const Napi::CallbackInfo& info);
  Napi::Value closeOpened(const Napi::CallbackInfo& info);
  Napi::Value knowsOpeners(const Napi::CallbackInfo& info);
  void reset(const Napi::CallbackInfo& info);
  Napi::Value settle(const Napi::CallbackInfo& info);
  Napi::Value disturbed(const Napi::CallbackInfo& info);
  Napi::Value close(const Napi::CallbackInfo& info);

  std::shared_ptr<OpenGate> gate_;
};

/// An image's header and first-level tables, as they were last read. Work that has begun goes on
/// with what it began with.
struct Qcow2Tables {
  std::mutex mutex;
  std::shared_ptr<const qcow2::Image> image;

  std::shared_ptr<const qcow2::Image> get() {
    std::lock_guard<std::mutex> guard(mutex);
    return image;
  }
  void set(std::shared_ptr<const qcow2::Image> next) {
    std::lock_guard<std::mutex> guard(mutex);
    image = std::move(next);
  }
};

/// The JavaScript class that holds them: `new Qcow2Tables()`, `close()`.
class Qcow2TablesObject : public Napi::ObjectWrap<Qcow2TablesObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Qcow2TablesObject(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<Qcow2TablesObject>(info) {}

  std::shared_ptr<Qcow2Tables> tables() const { return tables_; }

 private:
  void close(const Napi::CallbackInfo&) { tables_->set(nullptr); }

  std::shared_ptr<Qcow2Tables> tables_ = std::make_shared<Qcow2Tables>();
};

/// An allocation in place that is under way. One call at a time: each brings the descriptors that
/// it works with, which may be others than those of the call before.
struct Qcow2Session {
  std::mutex mutex;
  qcow2::FileIo file{-1};
  qcow2::FileIo data{-1};
  std::unique_ptr<qcow2::Allocator> allocator;
};

/// The JavaScript class that holds it: `new Qcow2Session()`, `close()`.
class Qcow2SessionObject : public Napi::ObjectWrap<Qcow2SessionObject> {
 public:
  static Napi::Function define(Napi::Env env);
  explicit Qcow2SessionObject(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<Qcow2SessionObject>(info) {}

  std::shared_ptr<Qcow2Session> session() const { return session_; }

 private:
  /// What runs keeps its session; calls from now on get an empty one.
  void close(const Napi::CallbackInfo&) { session_ = std::make_shared<Qcow2Session>(); }

  std::shared_ptr<Qcow2Session> session_ = std::make_shared<Qcow2Session>();
};

/// A number of bytes that is a property of an object.
uint64_t bytesField(Napi::Object object, const char* name);
int descriptorField(Napi::Object object, const char* name);
Napi::Object objectArg(const Napi::CallbackInfo& info, size_t index);

/// {fd, method, dataFd, dataMethod}
qcow2::HostFiles hostFilesArg(const Napi::CallbackInfo& info, size_t index);

/// How the system call ended that an outcome is about. A refusal is no call's failure.
Status statusOf(const qcow2::Outcome& outcome);

/// Sets code, message, offset and length: how it ended.
void setOutcome(Napi::Env env, Napi::Object value, const qcow2::Outcome& outcome);

template <typename Array, typename Element>
Array typedArray(Napi::Env env, const std::vector<Element>& from) {
  Array array = Array::New(env, from.size());
  if (!from.empty()) std::memcpy(array.Data(), from.data(), from.size() * sizeof(Element));
  return array;
}

/// Sets what every page of extents has: offset, length, state, flags and next.
template <typename Page>
void setPage(Napi::Env env, Napi::Object value, const Page& page) {
  value.Set("offset", typedArray<Napi::Float64Array>(env, page.offset));
  value.Set("length", typedArray<Napi::Float64Array>(env, page.length));
  value.Set("state", typedArray<Napi::Uint8Array>(env, page.state));
  value.Set("flags", typedArray<Napi::Uint32Array>(env, page.flags));
  value.Set("next", static_cast<double>(page.next));
}

void exportExtents(Napi::Env env, Napi::Object exports);
void exportAllocate(Napi::Env env, Napi::Object exports);
void exportDevice(Napi::Env env, Napi::Object exports);
void exportFile(Napi::Env env, Napi::Object exports);
void exportLock(Napi::Env env, Napi::Object exports);
void exportPeer(Napi::Env env, Napi::Object exports);
void exportQcow2(Napi::Env env, Napi::Object exports);
void exportQcow2Allocate(Napi::Env env, Napi::Object exports);

}  // namespace thicken
