#include "survey.h"

#include <algorithm>

#include "../pages.h"
#include "refcounts.h"
#include "references.h"

namespace thicken::qcow2 {
namespace {

// 32 bits a cluster: two of use, the three flags, and the number of references. Snapshots make
// thousands of them, and a table that the L1 table names over and over, millions.
using Mark = uint32_t;
constexpr Mark kUseMask = 0x3;
constexpr Mark kActive = 0x4;
constexpr Mark kOnce = 0x8;
constexpr Mark kPacked = 0x10;
constexpr uint32_t kCountShift = 5;
constexpr Mark kOneReference = Mark{1} << kCountShift;
constexpr Mark kMostReferences = ~Mark{0} >> kCountShift;
// What most clusters of most images are.
constexpr Mark kPlainData = static_cast<Mark>(Use::guest) | kActive | kOnce | kOneReference;
constexpr size_t kMostListed = 1u << 20;

Range bytesOf(const Image& image, uint64_t cluster) {
  return Range{cluster << image.geometry.clusterBits, image.geometry.clusterSize()};
}

// The references to the clusters of one window of the file.
class Tally final : public ReferenceSink {
 public:
  Tally(const Image& image, ClusterRun window)
      : image_(image),
        window_(window),
        pages_(window.count * sizeof(Mark)),
        marks_(static_cast<Mark*>(pages_.data())) {}

  bool hasMemory() const { return marks_ != nullptr; }
  uint64_t referenced() const { return referenced_; }

  Outcome add(const Reference& reference) override {
    const uint64_t first = std::max(reference.clusters.first, window_.first);
    const uint64_t end = std::min(reference.clusters.end(), window_.end());
    const Mark use = static_cast<Mark>(reference.use);
    Mark flags = reference.active ? kActive : 0;
    if (reference.copied) flags |= kOnce;
    if (reference.packed && reference.active) flags |= kPacked;
    for (uint64_t cluster = first; cluster < end; cluster++) {
      Mark& mark = marks_[cluster - window_.first];
      if (mark == 0) {
        mark = use | flags | kOneReference;
        referenced_++;
        continue;
      }
      if ((mark & kUseMask) != use || reference.use == Use::exclusive)
        return Outcome::refused(Code::overlap,
                                "a cluster is used for two things; `qemu-img check` tells more",
                                bytesOf(image_, cluster));
      if (mark >> kCountShift == kMostReferences)
        return Outcome::refused(Code::unsupported,
                                "a cluster is referred to more often than can be counted",
                                bytesOf(image_, cluster));
      mark = (mark | flags) + kOneReference;
    }
    return {};
  }

  Mark mark(uint64_t cluster) const {
    const bool inside = cluster >= window_.first && cluster < window_.end();
    return inside ? marks_[cluster - window_.first] : Mark{0};
  }

 private:
  const Image& image_;
  ClusterRun window_;
  ZeroedPages pages_;
  Mark* marks_;
  uint64_t referenced_ = 0;
};

class Comparison {
 public:
  Comparison(const Image& image, const Tally& tally, Survey* survey)
      : image_(image), tally_(tally), survey_(survey) {}

  uint64_t matched() const { return matched_; }

  // Goes past counts that are what most are: of a free cluster, or of guest data that one entry
  // refers to. Returns the first of another kind, for compare(): an outcome for each would take
  // longer than all else.
  uint64_t passUsual(const uint8_t* block, uint64_t firstCluster, uint64_t from, uint64_t end) {
    uint64_t at = from;
    uint64_t used = 0;
    uint64_t usedEnd = 0;
    for (; at < end; at++) {
      const uint64_t count = getCount(block, image_.geometry.refcountOrder, at);
      if (count == 0) continue;
      if (count != 1 || tally_.mark(firstCluster + at) != kPlainData) break;
      used++;
      usedEnd = firstCluster + at + 1;
    }
    survey_->counted += used;
    survey_->end = std::max(survey_->end, usedEnd);
    matched_ += used;
    return at;
  }

  Outcome compare(uint64_t cluster, uint64_t count) {
    survey_->counted++;
    survey_->end = std::max(survey_->end, cluster + 1);
    const Mark mark = tally_.mark(cluster);
    const uint64_t references = mark >> kCountShift;
    if (references != 0) matched_++;
    const bool isTable = static_cast<Use>(mark & kUseMask) != Use::guest;
    if (references != 0 && isTable) addTo(&survey_->tables, cluster);
    if ((mark & kPacked) != 0) addTo(&survey_->packed, cluster);
    if (count < references || ((mark & kOnce) != 0 && count != 1))
      return Outcome::refused(Code::corrupt,
                              "a cluster's reference count is wrong; repair the image with "
                              "`qemu-img check -r all` after making a copy",
                              bytesOf(image_, cluster));
    if (count == references || !image_.header.allKnown) return {};
    // Brought down to one, the entry that remains would need its flag.
    if (references == 1 && (mark & kActive) != 0) {
      if (survey_->flagless.size() < kMostListed)
        survey_->flagless.push_back(Excess{cluster, count - references});
      return {};
    }
    list(cluster, count, references);
    return {};
  }

 private:
  // Too many to be listed one by one: the last entry takes in what lies between them.
  static void addTo(std::vector<ClusterRun>* list, uint64_t cluster) {
    const bool follows = !list->empty() && list->back().end() == cluster;
    if (follows || list->size() >= kMostListed)
      list->back().count = cluster + 1 - list->back().first;
    else
      list->push_back(ClusterRun{cluster, 1});
  }

  void list(uint64_t cluster, uint64_t count, uint64_t references) {
    std::vector<ClusterRun>& leaks = survey_->leaks;
    if (references == 0 && count == 1) {
      if (!leaks.empty() && leaks.back().end() == cluster) {
        leaks.back().count++;
        return;
      }
      if (leaks.size() < kMostListed) {
        leaks.push_back(ClusterRun{cluster, 1});
        return;
      }
    } else if (survey_->excess.size() < kMostListed) {
      survey_->excess.push_back(Excess{cluster, count - references});
      return;
    }
    survey_->leaked++;
  }

  const Image& image_;
  const Tally& tally_;
  Survey* survey_;
  uint64_t matched_ = 0;
};

// The counts of the window, which starts and ends with a block.
Outcome compareWindow(Io& io, const Image& image, ClusterRun window, const CancelFlag& cancel,
                      Comparison* comparison, bool* cancelled) {
  const Geometry& geometry = image.geometry;
  const uint64_t entries = geometry.blockEntries();
  const uint64_t last = std::min<uint64_t>(image.refcountTable.size(), window.end() / entries);
  std::vector<uint8_t> block(geometry.clusterSize());
  for (uint64_t index = window.first / entries; index < last; index++) {
    if (image.refcountTable[index] == 0) continue;
    if (cancel.isSet()) {
      *cancelled = true;
      return {};
    }
    Status status = readPadded(io, Range{image.refcountTable[index], block.size()}, block.data());
    if (!status.ok()) return Outcome::of(status);
    const uint64_t first = index * entries;
    for (uint64_t i = 0;; i++) {
      i = comparison->passUsual(block.data(), first, i, entries);
      if (i == entries) break;
      const uint64_t count = getCount(block.data(), geometry.refcountOrder, i);
      Outcome outcome = comparison->compare(first + i, count);
      if (!outcome.ok()) return outcome;
    }
  }
  return {};
}

Outcome surveyWindow(Io& io, const Image& image, ClusterRun window, const CancelFlag& cancel,
                     Survey* survey) {
  // Clusters beyond the file can have counts, but no references.
  const uint64_t end = std::min(window.end(), image.hostClusters());
  const ClusterRun referable{window.first, end > window.first ? end - window.first : 1};
  Tally tally(image, referable);
  if (!tally.hasMemory()) return Outcome::of(Status{ENOMEM, "mmap"});
  Outcome outcome;
  if (end > window.first) outcome = walkReferences(io, image, cancel, &tally, &survey->cancelled);
  Comparison comparison(image, tally, survey);
  if (outcome.ok() && !survey->cancelled)
    outcome = compareWindow(io, image, window, cancel, &comparison, &survey->cancelled);
  if (outcome.ok() && !survey->cancelled && comparison.matched() != tally.referenced())
    return Outcome::refused(Code::corrupt,
                            "a cluster in use has no reference count; repair the image with "
                            "`qemu-img check -r all` after making a copy");
  return outcome;
}

}  // namespace

Outcome surveyImage(Io& io, const Image& image, const CancelFlag& cancel, Survey* survey,
                    uint64_t window) {
  *survey = Survey{};
  const uint64_t entries = image.geometry.blockEntries();
  const uint64_t step = std::max<uint64_t>(1, window / entries) * entries;
  const uint64_t end = std::max(image.hostClusters(), image.refcountTable.size() * entries);
  Outcome outcome;
  for (uint64_t first = 0; outcome.ok() && first < end && !survey->cancelled;) {
    // Behind the last cluster that can be referred to, one pass takes all counts.
    const uint64_t count = first < image.hostClusters() ? step : end - first;
    outcome = surveyWindow(io, image, ClusterRun{first, count}, cancel, survey);
    first += count;
  }
  return outcome;
}

}  // namespace thicken::qcow2
