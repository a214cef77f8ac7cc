// Drives native/qcow2 from a shell; prints one JSON object.
//   qcow2_tool info FILE
//   qcow2_tool map FILE [offset=N] [length=N] [page=N] [quiet=1]
//   qcow2_tool survey FILE
//   qcow2_tool allocate FILE [offset=N] [length=N] [level=metadata|falloc|full] [piece=N]
//                            [data=FILE] [backing-end=N] [direct=ALIGNMENT]
//   qcow2_tool crash FILE [the same] [samples=N] [seed=N] [folder=PATH] [every=N]
#include <fcntl.h>
#include <sys/resource.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "../qcow2/allocate.h"
#include "../qcow2/map.h"
#include "qcow2_crash.h"

using namespace thicken::qcow2;
using thicken::CancelFlag;
using thicken::Range;

namespace {

using Arguments = std::map<std::string, std::string>;

unsigned long long wide(uint64_t value) { return value; }

uint64_t numberOf(const Arguments& arguments, const char* name, uint64_t otherwise) {
  const auto found = arguments.find(name);
  return found == arguments.end() ? otherwise : std::stoull(found->second);
}

std::string textOf(const Arguments& arguments, const char* name) {
  const auto found = arguments.find(name);
  return found == arguments.end() ? std::string() : found->second;
}

int report(const Outcome& outcome) {
  std::printf(
      "{\"code\":\"%s\",\"message\":\"%s\",\"errno\":%d,\"syscall\":\"%s\",\"offset\":%llu}\n",
      codeName(outcome.code), outcome.message.c_str(), outcome.status.error, outcome.status.syscall,
      wide(outcome.status.offset));
  return outcome.ok() ? 0 : 1;
}

Range rangeOf(const Arguments& arguments) {
  return Range{numberOf(arguments, "offset", 0), numberOf(arguments, "length", 1ull << 60)};
}

Request requestOf(const Arguments& arguments) {
  Request request;
  request.range = rangeOf(arguments);
  request.backingEnd = numberOf(arguments, "backing-end", ~0ull);
  const std::string level = textOf(arguments, "level");
  if (level == "metadata") request.level = Level::metadata;
  if (level == "full") request.level = Level::full;
  return request;
}

std::vector<uint8_t> contentOf(const std::string& path) {
  if (path.empty()) return {};
  std::ifstream in(path, std::ios::binary);
  return std::vector<uint8_t>(std::istreambuf_iterator<char>(in), {});
}

long peakKilobytes() {
  struct rusage usage {};
  getrusage(RUSAGE_SELF, &usage);
  return usage.ru_maxrss;
}

double secondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

int info(Io& file) {
  Image image;
  Outcome outcome = openImage(file, &image);
  if (!outcome.ok()) return report(outcome);
  const Header& header = image.header;
  std::printf(
      "{\"code\":\"OK\",\"version\":%u,\"clusterSize\":%llu,\"virtualSize\":%llu,"
      "\"snapshots\":%zu,\"bitmaps\":%u,\"backing\":\"%s\",\"backingFormat\":\"%s\","
      "\"dataFile\":\"%s\",\"luks\":%llu,\"allKnown\":%s,\"autoclear\":%llu,"
      "\"refcountBits\":%u,\"extended\":%s,\"writable\":\"%s\"}\n",
      header.version, wide(image.geometry.clusterSize()), wide(header.virtualSize),
      image.snapshots.size(), header.bitmapCount, header.backingFile.c_str(),
      header.backingFormat.c_str(), header.dataFile.c_str(), wide(header.luks.length),
      header.allKnown ? "true" : "false", wide(header.autoclear), 1u << header.refcountOrder,
      image.geometry.extended ? "true" : "false", codeName(checkWritable(header).code));
  return 0;
}

int map(Io& file, const Arguments& arguments) {
  Image image;
  Outcome outcome = openImage(file, &image);
  if (!outcome.ok()) return report(outcome);
  const bool quiet = numberOf(arguments, "quiet", 0) != 0;
  const Range range = rangeOf(arguments);
  const uint64_t end = std::min(range.end(), image.geometry.virtualSize);
  const auto start = std::chrono::steady_clock::now();
  MapReader reader(file, image);
  uint64_t extents = 0;
  std::printf("{\"extents\":[");
  for (uint64_t at = range.offset; at < end;) {
    MapPage page;
    outcome =
        reader.read(Range{at, end - at}, numberOf(arguments, "page", 4096), CancelFlag(), &page);
    if (!outcome.ok()) break;
    for (size_t i = 0; i < page.size() && !quiet; i++)
      std::printf("%s[%.0f,%.0f,%u,%.0f,%u]", extents + i == 0 ? "" : ",", page.offset[i],
                  page.length[i], page.state[i], page.host[i], page.flags[i]);
    extents += page.size();
    at = page.next;
  }
  std::printf(
      "],\"code\":\"%s\",\"message\":\"%s\",\"count\":%llu,\"seconds\":%.6f,\"peakKiB\":%ld}\n",
      codeName(outcome.code), outcome.message.c_str(), wide(extents), secondsSince(start),
      peakKilobytes());
  return outcome.ok() ? 0 : 1;
}

int survey(Io& file) {
  Image image;
  Survey found;
  Outcome outcome = openImage(file, &image);
  if (outcome.ok()) outcome = surveyImage(file, image, CancelFlag(), &found);
  if (!outcome.ok()) return report(outcome);
  uint64_t leaks = 0;
  for (const ClusterRun& run : found.leaks) leaks += run.count;
  std::printf("{\"code\":\"OK\",\"leaks\":%llu,\"excess\":%zu,\"counted\":%llu,\"end\":%llu}\n",
              wide(leaks), found.excess.size(), wide(found.counted), wide(found.end));
  return 0;
}

int openFile(const std::string& path, int flags = 0) {
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC | flags);
  if (fd < 0) {
    std::perror(path.c_str());
    std::exit(2);
  }
  return fd;
}

int allocate(Io& file, const Arguments& arguments) {
  const auto start = std::chrono::steady_clock::now();
  const std::string dataPath = textOf(arguments, "data");
  FileIo data(dataPath.empty() ? -1 : openFile(dataPath));
  const Request request = requestOf(arguments);
  Image image;
  Outcome outcome = openImage(file, &image);
  if (!outcome.ok()) return report(outcome);
  const uint64_t end =
      std::min(request.range.offset + request.range.length, image.geometry.virtualSize);
  Allocator allocator(file, dataPath.empty() ? nullptr : &data, std::move(image));
  bool cancelled = false;
  outcome = allocator.prepare(request, CancelFlag(), &cancelled);
  const double prepared = secondsSince(start);
  uint64_t mapped = 0;
  uint64_t calls = 0;
  bool reserved = true;
  Progress progress;
  const uint64_t piece = numberOf(arguments, "piece", 64ull << 30);
  for (uint64_t at = request.range.offset; outcome.ok() && at < end; at = progress.next, calls++) {
    outcome = allocator.allocate(Range{at, std::min(piece, end - at)}, CancelFlag(), &progress);
    mapped += progress.mapped;
    reserved = reserved && progress.reserved;
  }
  if (outcome.ok()) outcome = allocator.finish(CancelFlag(), &progress);
  if (!outcome.ok()) return report(outcome);
  const Needed& needed = allocator.needed();
  std::printf(
      "{\"code\":\"OK\",\"mapped\":%llu,\"calls\":%llu,\"reserved\":%s,\"needed\":{\"data\":%llu,"
      "\"tables\":%llu,\"refcounts\":%llu,\"reused\":%llu,\"freed\":%llu,\"reserve\":%llu,"
      "\"counted\":%llu,\"fileEnd\":%llu},\"prepareSeconds\":%.6f,\"seconds\":%.6f,\"peakKiB\":%ld}"
      "\n",
      wide(mapped), wide(calls), reserved && progress.reserved ? "true" : "false",
      wide(needed.data), wide(needed.tables), wide(needed.refcounts), wide(needed.reused),
      wide(needed.freed), wide(needed.reserve), wide(needed.counted), wide(needed.fileEnd),
      prepared, secondsSince(start), peakKilobytes());
  return 0;
}

int crash(const std::string& path, const Arguments& arguments) {
  thicken_test::CrashOptions options;
  options.request = requestOf(arguments);
  options.piece = numberOf(arguments, "piece", ~0ull);
  options.samples = numberOf(arguments, "samples", 50);
  options.seed = numberOf(arguments, "seed", 1);
  options.every = numberOf(arguments, "every", 1000);
  options.tail = numberOf(arguments, "tail", 0);
  options.folder = textOf(arguments, "folder");
  const thicken_test::CrashResult result =
      thicken_test::replayCrashes(contentOf(path), contentOf(textOf(arguments, "data")), options);
  std::printf(
      "{\"failure\":\"%s\",\"operations\":%llu,\"syncs\":%llu,\"states\":%llu,"
      "\"leaking\":%llu,\"written\":%llu}\n",
      result.failure.c_str(), wide(result.operations), wide(result.syncs), wide(result.states),
      wide(result.leaking), wide(result.written));
  return result.failure.empty() ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) return 2;
  const std::string command = argv[1];
  Arguments arguments;
  for (int i = 3; i < argc; i++) {
    const std::string argument = argv[i];
    const size_t at = argument.find('=');
    if (at == std::string::npos) return 2;
    arguments[argument.substr(0, at)] = argument.substr(at + 1);
  }
  if (command == "crash") return crash(argv[2], arguments);
  const uint64_t alignment = numberOf(arguments, "direct", 0);
  FileIo file(openFile(argv[2]), alignment == 0 ? -1 : openFile(argv[2], O_DIRECT), alignment);
  if (command == "info") return info(file);
  if (command == "map") return map(file, arguments);
  if (command == "survey") return survey(file);
  if (command == "allocate") return allocate(file, arguments);
  return 2;
}
