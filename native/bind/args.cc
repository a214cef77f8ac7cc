#include "args.h"

#include <cmath>

#include "../task.h"

namespace thicken {
namespace {

constexpr size_t kMostExtents = 1u << 20;
constexpr double kMostBytes = 9007199254740991.0;  // 2^53-1

uint64_t bytesOfNumber(Napi::Env env, double value) {
  if (!(value >= 0 && value <= kMostBytes) || value != std::floor(value))
    throw Napi::RangeError::New(env, "expected a whole number of bytes, 0 to 2^53-1");
  return static_cast<uint64_t>(value);
}

}  // namespace

int descriptorArg(const Napi::CallbackInfo& info, size_t index) {
  if (!info[index].IsNumber()) throw Napi::TypeError::New(info.Env(), "expected a file descriptor");
  return info[index].As<Napi::Number>().Int32Value();
}

uint64_t bytesOf(Napi::Value value) {
  if (!value.IsNumber()) throw Napi::TypeError::New(value.Env(), "expected a number of bytes");
  return bytesOfNumber(value.Env(), value.As<Napi::Number>().DoubleValue());
}

uint32_t codeArg(const Napi::CallbackInfo& info, size_t index, uint32_t limit) {
  const uint64_t code = bytesOf(info[index]);
  if (code >= limit) throw Napi::RangeError::New(info.Env(), "unknown code");
  return static_cast<uint32_t>(code);
}

std::vector<Range> rangesArg(const Napi::CallbackInfo& info, size_t index) {
  Napi::Env env = info.Env();
  if (!info[index].IsTypedArray() ||
      info[index].As<Napi::TypedArray>().TypedArrayType() != napi_float64_array)
    throw Napi::TypeError::New(env, "expected a Float64Array of ranges");
  auto numbers = info[index].As<Napi::Float64Array>();
  if (numbers.ElementLength() % 2 != 0)
    throw Napi::TypeError::New(env, "expected pairs of offset and length");
  std::vector<Range> ranges;
  ranges.reserve(numbers.ElementLength() / 2);
  for (size_t i = 0; i < numbers.ElementLength(); i += 2)
    ranges.push_back(Range{bytesOfNumber(env, numbers[i]), bytesOfNumber(env, numbers[i + 1])});
  return ranges;
}

PageRequest pageArg(const Napi::CallbackInfo& info, size_t index) {
  const uint64_t offset = bytesOf(info[index]);
  const uint64_t end = bytesOf(info[index + 1]);
  const uint64_t most = bytesOf(info[index + 2]);
  if (end < offset || most < 1 || most > kMostExtents)
    throw Napi::RangeError::New(info.Env(), "expected offset <= end and 1 to 2^20 extents");
  return PageRequest{Range{offset, end - offset}, most};
}

Napi::Object objectArg(const Napi::CallbackInfo& info, size_t index) {
  if (!info[index].IsObject()) throw Napi::TypeError::New(info.Env(), "expected an object");
  return info[index].As<Napi::Object>();
}

uint64_t bytesField(Napi::Object object, const char* name) {
  return bytesOf(static_cast<Napi::Value>(object.Get(name)));
}

int descriptorField(Napi::Object object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (!value.IsNumber()) throw Napi::TypeError::New(object.Env(), "expected a file descriptor");
  return value.As<Napi::Number>().Int32Value();
}

std::vector<uint64_t> listArg(const Napi::CallbackInfo& info, size_t index) {
  if (!info[index].IsArray()) throw Napi::TypeError::New(info.Env(), "expected an array");
  auto array = info[index].As<Napi::Array>();
  std::vector<uint64_t> list;
  for (uint32_t i = 0; i < array.Length(); i++)
    list.push_back(bytesOf(static_cast<Napi::Value>(array[i])));
  return list;
}

std::shared_ptr<CancelFlag> cancelArg(const Napi::CallbackInfo& info, size_t index) {
  if (info[index].IsUndefined()) return std::make_shared<CancelFlag>();
  const auto& flags = info.Env().GetInstanceData<AddonData>()->cancelFlagClass;
  return unwrap<CancelFlagObject>(info[index], flags, "expected a CancelFlag")->flag();
}

Napi::Value workValue(Napi::Env env, const Work& work) {
  Napi::Object value = Napi::Object::New(env);
  value.Set("allocated", static_cast<double>(work.allocated));
  value.Set("skipped", static_cast<double>(work.skipped));
  value.Set("requests", static_cast<double>(work.requests));
  value.Set("cancelled", work.cancelled);
  value.Set("disturbed", work.disturbed);
  return value;
}

Napi::Function CancelFlagObject::define(Napi::Env env) {
  return DefineClass(env, "CancelFlag", {InstanceMethod<&CancelFlagObject::cancel>("cancel")});
}

std::shared_ptr<OpenGate> gateArg(Napi::Value value) {
  const auto& gates = value.Env().GetInstanceData<AddonData>()->openGateClass;
  std::shared_ptr<OpenGate> gate =
      unwrap<OpenGateObject>(value, gates, "expected an OpenGate")->gate();
  if (!gate) throw Napi::TypeError::New(value.Env(), "the gate is closed");
  return gate;
}

Napi::Function OpenGateObject::define(Napi::Env env) {
  return DefineClass(env, "OpenGate",
                     {InstanceMethod<&OpenGateObject::watch>("watch"),
                      InstanceMethod<&OpenGateObject::open>("open"),
                      InstanceMethod<&OpenGateObject::closeOpened>("closeOpened"),
                      InstanceMethod<&OpenGateObject::knowsOpeners>("knowsOpeners"),
                      InstanceMethod<&OpenGateObject::reset>("reset"),
                      InstanceMethod<&OpenGateObject::settle>("settle"),
                      InstanceMethod<&OpenGateObject::disturbed>("disturbed"),
                      InstanceMethod<&OpenGateObject::close>("close")});
}

const std::shared_ptr<OpenGate>& OpenGateObject::current(const Napi::CallbackInfo& info) {
  if (!gate_) throw Napi::TypeError::New(info.Env(), "the gate is closed");
  return gate_;
}

void OpenGateObject::watch(const Napi::CallbackInfo& info) {
  const Status status = current(info)->watch(descriptorArg(info, 0));
  if (!status.ok()) throw errorOf(info.Env(), status);
}

// (fd, flags) → another descriptor
Napi::Value OpenGateObject::open(const Napi::CallbackInfo& info) {
  const int fd = descriptorArg(info, 0);
  const int flags = static_cast<int>(bytesOf(info[1]));
  return queue<int>(
      info.Env(), std::make_shared<CancelFlag>(),
      [gate = current(info), fd, flags](int* opened, const CancelFlag& cancel) {
        return gate->open(fd, flags, cancel, opened);
      },
      [](Napi::Env env, const int& opened) { return Napi::Number::New(env, opened); });
}

// (fd)
Napi::Value OpenGateObject::closeOpened(const Napi::CallbackInfo& info) {
  struct Nothing {};
  return queue<Nothing>(
      info.Env(), std::make_shared<CancelFlag>(),
      [gate = current(info), fd = descriptorArg(info, 0)](Nothing*, const CancelFlag&) {
        return gate->closeOpened(fd);
      },
      [](Napi::Env env, const Nothing&) { return env.Undefined(); });
}

Napi::Value OpenGateObject::knowsOpeners(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), current(info)->knowsOpeners());
}

void OpenGateObject::reset(const Napi::CallbackInfo& info) { current(info)->reset(); }

Napi::Value OpenGateObject::settle(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), current(info)->settle());
}

Napi::Value OpenGateObject::disturbed(const Napi::CallbackInfo& info) {
  return Napi::Boolean::New(info.Env(), current(info)->disturbed());
}

Napi::Value OpenGateObject::close(const Napi::CallbackInfo& info) {
  struct Nothing {};
  // The task lives on until it is settled: its hold is given up within it.
  auto last = std::make_shared<std::shared_ptr<OpenGate>>(std::move(gate_));
  return queue<Nothing>(
      info.Env(), std::make_shared<CancelFlag>(),
      [last](Nothing*, const CancelFlag&) {
        last->reset();
        return Status{};
      },
      [](Napi::Env env, const Nothing&) { return env.Undefined(); });
}

}  // namespace thicken
