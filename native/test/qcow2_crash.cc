#include "qcow2_crash.h"

#include <fstream>
#include <random>

#include "../qcow2/map.h"
#include "../qcow2/references.h"
#include "qcow2_content.h"

namespace thicken_test {

using namespace thicken::qcow2;
using thicken::CancelFlag;

Outcome allocateAll(Io& file, Io* data, const Request& request, uint64_t piece) {
  Image image;
  bool cancelled = false;
  Outcome outcome = openImage(file, &image);
  if (!outcome.ok()) return outcome;
  const uint64_t size = image.geometry.virtualSize;
  Allocator allocator(file, data, std::move(image));
  outcome = allocator.prepare(request, CancelFlag(), &cancelled);
  const uint64_t start = std::min(request.range.offset, size);
  const uint64_t end = start + std::min(request.range.length, size - start);
  Progress progress;
  for (uint64_t at = start; outcome.ok() && at < end; at = progress.next)
    outcome = allocator.allocate(Range{at, std::min(piece, end - at)}, CancelFlag(), &progress);
  if (outcome.ok()) outcome = allocator.finish(CancelFlag(), &progress);
  return outcome;
}

namespace {

struct Files {
  MemoryIo file;
  MemoryIo data;
};

struct Content {
  std::vector<std::vector<uint8_t>> parts;  ///< the active one, then each snapshot's
  std::string failure;
  bool leaks = false;
};

Content inspect(Files* files) {
  Content content;
  Image image;
  Survey survey;
  Outcome outcome = openImage(files->file, &image);
  if (outcome.ok()) outcome = checkWritable(image.header);
  if (outcome.ok()) outcome = surveyImage(files->file, image, CancelFlag(), &survey);
  if (!outcome.ok()) {
    content.failure = std::string(codeName(outcome.code)) + ": " + outcome.message;
    return content;
  }
  content.leaks = !survey.leaks.empty() || !survey.excess.empty();
  ContentReader reader(files->file, files->data, image);
  content.parts.push_back(reader.active());
  for (const Snapshot& snapshot : image.snapshots)
    content.parts.push_back(reader.snapshot(snapshot));
  return content;
}

constexpr uint8_t kOldByte = 0xaa;

class UsedClusters final : public ReferenceSink {
 public:
  explicit UsedClusters(uint64_t count) : used(count) {}
  Outcome add(const Reference& reference) override {
    const uint64_t end = std::min<uint64_t>(reference.clusters.end(), used.size());
    for (uint64_t i = reference.clusters.first; i < end; i++) used[i] = true;
    return {};
  }
  std::vector<bool> used;
};

// Old bytes wherever nothing that can be read lies.
void poison(Files* files) {
  Image image;
  bool cancelled = false;
  if (!openImage(files->file, &image).ok()) return;
  const uint64_t size = image.geometry.clusterSize();
  UsedClusters clusters(image.hostClusters());
  if (!walkReferences(files->file, image, CancelFlag(), &clusters, &cancelled).ok()) return;
  std::vector<uint8_t>& bytes = files->file.bytes();
  for (uint64_t at = 0; at < bytes.size(); at++)
    if (!clusters.used[at / size]) bytes[at] = kOldByte;
  if (!image.geometry.externalData) return;
  MapPage page;
  MapReader reader(files->file, image);
  if (!reader.read(Range{0, image.geometry.virtualSize}, ~0ull, CancelFlag(), &page).ok()) return;
  for (size_t i = 0; i < page.size(); i++) {
    const size_t start = static_cast<size_t>(page.offset[i]);
    const size_t end =
        std::min(files->data.bytes().size(), start + static_cast<size_t>(page.length[i]));
    for (size_t at = start; at < end && page.state[i] != static_cast<uint8_t>(GuestState::data);
         at++)
      files->data.bytes()[at] = kOldByte;
  }
}

void apply(const Operation& operation, Range part, Files* files) {
  MemoryIo& io = operation.file == 0 ? files->file : files->data;
  if (operation.kind == Operation::Kind::reserve) {
    io.reserve(operation.range, operation.keepSize);
  } else if (operation.kind == Operation::Kind::write) {
    if (operation.data.empty())
      io.writeZeros(part);
    else
      io.write(part, operation.data.data() + (part.offset - operation.range.offset));
  }
}

class Replay {
 public:
  Replay(const CrashOptions& options, const Files& base, const std::vector<Operation>& log)
      : options_(options), base_(base), log_(log), random_(options.seed), durable_(base) {}

  CrashResult run() {
    expected_ = inspect(&base_);
    result_.failure = expected_.failure;
    result_.operations = log_.size();
    for (size_t i = 0; i < log_.size() && result_.failure.empty(); i++) {
      look(prefix(i), "prefix " + std::to_string(i));
      if (log_[i].kind != Operation::Kind::sync) continue;
      result_.syncs++;
      for (uint64_t n = 0; n < options_.samples && result_.failure.empty(); n++) {
        const size_t end = pending_.empty() ? i : pending_[random_() % pending_.size()] + 1;
        look(sample(end), "sample before operation " + std::to_string(end));
      }
      settle(log_[i].file);
    }
    if (result_.failure.empty()) look(prefix(log_.size()), "the end");
    return result_;
  }

 private:
  // All of the unsynced operations before `end`.
  Files prefix(size_t end) {
    if (end > 0 && log_[end - 1].kind != Operation::Kind::sync) pending_.push_back(end - 1);
    Files state = durable_;
    for (const size_t i : pending_) apply(log_[i], log_[i].range, &state);
    return state;
  }

  void settle(int file) {
    std::vector<size_t> left;
    for (const size_t i : pending_) {
      if (log_[i].file == file)
        apply(log_[i], log_[i].range, &durable_);
      else
        left.push_back(i);
    }
    pending_ = left;
  }

  // Some of the unsynced operations before `end`, in any order, some in part.
  Files sample(size_t end) {
    std::vector<size_t> order;
    for (const size_t i : pending_)
      if (i < end && random_() % 4 != 0) order.push_back(i);
    std::shuffle(order.begin(), order.end(), random_);
    Files state = durable_;
    for (const size_t i : order) {
      if (random_() % 2 == 0 || log_[i].kind != Operation::Kind::write)
        apply(log_[i], log_[i].range, &state);
      else
        tear(log_[i], &state);
    }
    return state;
  }

  void tear(const Operation& operation, Files* state) {
    const uint32_t kept = random_() % 8;
    for (uint64_t at = operation.range.offset; at < operation.range.end();) {
      const uint64_t end = std::min(operation.range.end(), (at / kSectorSize + 1) * kSectorSize);
      if (random_() % 8 < kept) apply(operation, Range{at, end - at}, state);
      at = end;
    }
  }

  void look(Files state, const std::string& name) {
    result_.states++;
    const bool writes = !options_.folder.empty() && result_.states % options_.every == 0;
    const std::string path = options_.folder + "/state-" + std::to_string(result_.states);
    if (writes) save(state, path);
    Content content = inspect(&state);
    if (content.leaks) result_.leaking++;
    compare(content, name);
    if (!result_.failure.empty()) return;
    poison(&state);
    Io* data = base_.data.bytes().empty() ? nullptr : &state.data;
    Outcome outcome = allocateAll(state.file, data, options_.request, options_.piece);
    if (!outcome.ok())
      result_.failure = name + ", second run: " + codeName(outcome.code) + ": " + outcome.message;
    content = inspect(&state);
    compare(content, name + ", second run");
    if (content.leaks && result_.failure.empty()) result_.failure = name + ": leaks are left";
    if (writes) save(state, path + ".completed");
  }

  void compare(const Content& content, const std::string& name) {
    if (!result_.failure.empty()) return;
    if (!content.failure.empty())
      result_.failure = name + ": " + content.failure;
    else if (content.parts != expected_.parts)
      result_.failure = name + ": content differs";
  }

  void save(const Files& state, const std::string& path) {
    const auto write = [](const std::vector<uint8_t>& bytes, const std::string& to) {
      std::ofstream out(to, std::ios::binary);
      out.write(reinterpret_cast<const char*>(bytes.data()),
                static_cast<std::streamsize>(bytes.size()));
    };
    write(state.file.bytes(), path + ".qcow2");
    if (!state.data.bytes().empty()) write(state.data.bytes(), path + ".data");
    result_.written++;
  }

  const CrashOptions& options_;
  Files base_;
  const std::vector<Operation>& log_;
  std::mt19937_64 random_;
  Files durable_;
  std::vector<size_t> pending_;
  Content expected_;
  CrashResult result_;
};

}  // namespace

CrashResult replayCrashes(const std::vector<uint8_t>& file, const std::vector<uint8_t>& data,
                          const CrashOptions& options) {
  Files base{MemoryIo(file), MemoryIo(data)};
  Image image;
  if (openImage(base.file, &image).ok() && options.tail > 0)
    base.file.bytes().resize((image.hostClusters() + options.tail) << image.geometry.clusterBits);
  poison(&base);
  Files live = base;
  std::vector<Operation> log;
  RecordingIo recordedFile(live.file, 0, &log);
  RecordingIo recordedData(live.data, 1, &log);
  Outcome outcome = allocateAll(recordedFile, data.empty() ? nullptr : &recordedData,
                                options.request, options.piece);
  CrashResult result;
  if (outcome.ok()) return Replay(options, base, log).run();
  result.failure = std::string(codeName(outcome.code)) + ": " + outcome.message;
  return result;
}

}  // namespace thicken_test
