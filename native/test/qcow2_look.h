#pragma once

#include "../qcow2/allocate.h"
#include "../qcow2/map.h"
#include "check.h"

namespace thicken_test {

inline thicken::qcow2::Request everything(
    thicken::qcow2::Level level = thicken::qcow2::Level::falloc) {
  thicken::qcow2::Request request;
  request.range = thicken::Range{0, ~0ull};
  request.level = level;
  return request;
}

inline thicken::qcow2::Survey surveyOf(thicken::qcow2::Io& io,
                                       uint64_t window = thicken::qcow2::kSurveyWindow) {
  thicken::qcow2::Image image;
  thicken::qcow2::Survey survey;
  CHECK(openImage(io, &image).ok());
  CHECK(surveyImage(io, image, thicken::CancelFlag(), &survey, window).ok());
  return survey;
}

inline thicken::qcow2::MapPage mapOf(thicken::qcow2::Io& io, size_t pageSize) {
  using namespace thicken::qcow2;
  Image image;
  CHECK(openImage(io, &image).ok());
  MapReader reader(io, image);
  MapPage all;
  for (uint64_t at = 0; at < image.geometry.virtualSize;) {
    MapPage page;
    const thicken::Range rest{at, image.geometry.virtualSize - at};
    CHECK(reader.read(rest, pageSize, thicken::CancelFlag(), &page).ok());
    CHECK(page.next > at);
    if (page.next <= at) break;
    all.offset.insert(all.offset.end(), page.offset.begin(), page.offset.end());
    all.length.insert(all.length.end(), page.length.begin(), page.length.end());
    all.host.insert(all.host.end(), page.host.begin(), page.host.end());
    all.state.insert(all.state.end(), page.state.begin(), page.state.end());
    at = page.next;
  }
  return all;
}

}  // namespace thicken_test
