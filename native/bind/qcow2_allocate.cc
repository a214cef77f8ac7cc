#include "../task.h"
#include "args.h"

namespace thicken {
namespace {

using qcow2::Allocator;
using qcow2::Code;
using qcow2::FileIo;
using qcow2::HostFiles;
using qcow2::HostNeeds;
using qcow2::Image;
using qcow2::Outcome;
using qcow2::Request;

std::shared_ptr<Qcow2Session> sessionArg(const Napi::CallbackInfo& info, size_t index) {
  const auto& sessions = info.Env().GetInstanceData<AddonData>()->qcow2SessionClass;
  return unwrap<Qcow2SessionObject>(info[index], sessions, "expected a Qcow2Session")->session();
}

struct Prepared {
  Outcome outcome;
  bool cancelled = false;
  uint64_t clusterSize = 0;
  bool external = false;
  qcow2::Needed needed;
  HostNeeds host;
  uint64_t surplus = 0;  // clusters counted too high, leaks among them
};

// {offset, length, level, backingEnd, zerosFollow, copied}
Request requestArg(const Napi::CallbackInfo& info, size_t index) {
  constexpr uint64_t kLevels = 3;
  const Napi::Object object = objectArg(info, index);
  const uint64_t level = bytesField(object, "level");
  if (level >= kLevels) throw Napi::RangeError::New(info.Env(), "unknown level");
  return Request{Range{bytesField(object, "offset"), bytesField(object, "length")},
                 static_cast<qcow2::Level>(level), bytesField(object, "backingEnd"),
                 object.Get("zerosFollow").ToBoolean().Value(), bytesField(object, "copied")};
}

Status prepare(Qcow2Session* session, const HostFiles& files, const Request& request,
               const CancelFlag& cancel, Prepared* prepared) {
  std::lock_guard<std::mutex> guard(session->mutex);
  session->file = FileIo(files.fd);
  session->data = FileIo(files.dataFd);
  session->allocator.reset();
  Image image;
  prepared->outcome = qcow2::openImage(session->file, &image);
  if (!prepared->outcome.ok()) return statusOf(prepared->outcome);
  prepared->clusterSize = image.geometry.clusterSize();
  prepared->external = image.geometry.externalData;
  qcow2::Io* data = files.dataFd < 0 ? nullptr : &session->data;
  session->allocator = std::make_unique<Allocator>(session->file, data, std::move(image));
  Allocator& allocator = *session->allocator;
  prepared->outcome = allocator.prepare(request, cancel, &prepared->cancelled);
  if (!prepared->outcome.ok() || prepared->cancelled) return statusOf(prepared->outcome);
  prepared->needed = allocator.needed();
  for (const qcow2::ClusterRun& leak : allocator.survey().leaks) prepared->surplus += leak.count;
  prepared->surplus += allocator.survey().excess.size();
  prepared->outcome = allocator.measureHost(files, cancel, &prepared->host);
  prepared->cancelled = cancel.isSet();
  return statusOf(prepared->outcome);
}

Napi::Value preparedValue(Napi::Env env, const Prepared& prepared) {
  Napi::Object value = Napi::Object::New(env);
  setOutcome(env, value, prepared.outcome);
  const auto set = [&](const char* name, uint64_t bytes) {
    value.Set(name, static_cast<double>(bytes));
  };
  const qcow2::Needed& needed = prepared.needed;
  set("clusterSize", prepared.clusterSize);
  set("data", needed.data * prepared.clusterSize);
  set("tables", needed.tables * prepared.clusterSize);
  set("refcounts", needed.refcounts * prepared.clusterSize);
  set("counted", needed.counted * prepared.clusterSize);
  set("freed", needed.freed * prepared.clusterSize);
  set("reserve", (needed.reserve + needed.blocks) * prepared.clusterSize);
  set("mixed", needed.mixed * prepared.clusterSize);
  const uint64_t stale = needed.stale * prepared.clusterSize;
  set("stale", prepared.external ? std::min(stale, prepared.host.heldData) : stale);
  set("fileEnd", needed.fileEnd);
  set("fileNeeds", prepared.host.file);
  set("dataNeeds", prepared.host.data);
  set("later", prepared.host.later);
  set("unreserved", prepared.host.unreserved);
  set("sharedFile", prepared.host.sharedFile);
  set("sharedData", prepared.host.sharedData);
  set("sharedTables", prepared.host.sharedTables);
  set("surplus", prepared.surplus * prepared.clusterSize);
  value.Set("cancelled", prepared.cancelled);
  return value;
}

// (session, files, request, cancel?) → needs; reads only
Napi::Value jsPrepareQcow2(const Napi::CallbackInfo& info) {
  return queue<Prepared>(
      info.Env(), cancelArg(info, 3),
      [session = sessionArg(info, 0), files = hostFilesArg(info, 1), request = requestArg(info, 2)](
          Prepared* prepared, const CancelFlag& cancel) {
        return prepare(session.get(), files, request, cancel, prepared);
      },
      preparedValue);
}

// What a call writes with.
struct Writers {
  std::shared_ptr<OpenGate> gate;
  std::shared_ptr<OpenGate> dataGate;
  FileIo file{-1};
  FileIo data{-1};
};

// {bufferedFd, directFd, directAlignment, gate}
FileIo writerOf(Napi::Object object, OpenGate* gate) {
  return FileIo(descriptorField(object, "bufferedFd"), descriptorField(object, "directFd"),
                bytesField(object, "directAlignment"), gate);
}

// (…, writers, dataWriters | undefined)
Writers writersArg(const Napi::CallbackInfo& info, size_t index) {
  const Napi::Object file = objectArg(info, index);
  Writers writers;
  writers.gate = gateArg(file.Get("gate"));
  writers.file = writerOf(file, writers.gate.get());
  if (info[index + 1].IsUndefined()) return writers;
  const Napi::Object data = objectArg(info, index + 1);
  writers.dataGate = gateArg(data.Get("gate"));
  writers.data = writerOf(data, writers.dataGate.get());
  return writers;
}

struct Done {
  Outcome outcome;
  qcow2::Progress progress;
  bool disturbed = false;
};

// Whoever opens a file meanwhile waits until the call has ended, where there are permission events:
// the tables are written as a whole, or not at all. Before them, the call ends at the next piece.
template <typename Work>
Status runGated(Qcow2Session* session, const Writers& writers, Done* done, Work work) {
  std::lock_guard<std::mutex> guard(session->mutex);
  if (!session->allocator) {
    done->outcome = Outcome::refused(Code::stale, "the allocation is closed");
    return {};
  }
  const GatePass pass(writers.gate.get());
  const GatePass dataPass(pass.granted() ? writers.dataGate.get() : nullptr);
  done->disturbed = !pass.granted() || !dataPass.granted();
  if (done->disturbed) return {};
  session->file = writers.file;
  session->data = writers.data;
  done->outcome = work(*session->allocator, &done->progress);
  done->disturbed = done->progress.disturbed;
  return statusOf(done->outcome);
}

Napi::Value doneValue(Napi::Env env, const Done& done) {
  Napi::Object value = Napi::Object::New(env);
  setOutcome(env, value, done.outcome);
  value.Set("next", static_cast<double>(done.progress.next));
  value.Set("beside", static_cast<double>(done.progress.beside));
  value.Set("mapped", static_cast<double>(done.progress.mapped));
  value.Set("cancelled", done.progress.cancelled);
  value.Set("reserved", done.progress.reserved);
  value.Set("disturbed", done.disturbed);
  return value;
}

// (session, writers, dataWriters | undefined, offset, length, cancel?) → progress
Napi::Value jsAllocateQcow2(const Napi::CallbackInfo& info) {
  const Range piece{bytesOf(info[3]), bytesOf(info[4])};
  return queue<Done>(
      info.Env(), cancelArg(info, 5),
      [piece, session = sessionArg(info, 0), writers = writersArg(info, 1)](
          Done* done, const CancelFlag& cancel) {
        return runGated(session.get(), writers, done,
                        [&](Allocator& allocator, qcow2::Progress* progress) {
                          return allocator.allocate(piece, cancel, progress);
                        });
      },
      doneValue);
}

// (session, writers, dataWriters | undefined, cancel?) → progress
Napi::Value jsFinishQcow2(const Napi::CallbackInfo& info) {
  return queue<Done>(
      info.Env(), cancelArg(info, 3),
      [session = sessionArg(info, 0), writers = writersArg(info, 1)](Done* done,
                                                                     const CancelFlag& cancel) {
        return runGated(session.get(), writers, done,
                        [&](Allocator& allocator, qcow2::Progress* progress) {
                          return allocator.finish(cancel, progress);
                        });
      },
      doneValue);
}

}  // namespace

Napi::Function Qcow2SessionObject::define(Napi::Env env) {
  return DefineClass(env, "Qcow2Session", {InstanceMethod<&Qcow2SessionObject::close>("close")});
}

void exportQcow2Allocate(Napi::Env env, Napi::Object exports) {
  exports.Set("prepareQcow2", Napi::Function::New(env, jsPrepareQcow2));
  exports.Set("allocateQcow2", Napi::Function::New(env, jsAllocateQcow2));
  exports.Set("finishQcow2", Napi::Function::New(env, jsFinishQcow2));
}

}  // namespace thicken
