#include "extents.h"

#include "extents/readers.h"

namespace thicken {
namespace {

Status readBy(ExtentMethod method, Reading* reading) {
  switch (method) {
    case ExtentMethod::fiemap: {
      Status status = readQuickly(reading);
      return status.ok() ? readFiemap(reading) : status;
    }
    case ExtentMethod::seek:
    case ExtentMethod::pages:
      return readSeek(reading, method == ExtentMethod::pages);
    case ExtentMethod::fibmap:
      return readFibmap(reading);
  }
  return Status{EINVAL, "readExtents"};
}

}  // namespace

void ExtentPage::add(Range range, HostState newState, uint32_t newFlags) {
  const uint8_t code = static_cast<uint8_t>(newState);
  if (size() > 0 && state.back() == code && flags.back() == newFlags) {
    length.back() += static_cast<double>(range.length);
    return;
  }
  offset.push_back(static_cast<double>(range.offset));
  length.push_back(static_cast<double>(range.length));
  state.push_back(code);
  flags.push_back(newFlags);
}

Status readExtents(int fd, ExtentMethod method, Range range, size_t maxExtents,
                   const CancelFlag& cancel, ExtentPage* page) {
  page->offset.reserve(maxExtents + 1);
  page->length.reserve(maxExtents + 1);
  page->state.reserve(maxExtents + 1);
  page->flags.reserve(maxExtents + 1);
  Reading reading(fd, range, maxExtents, cancel, page);
  Status status = readBy(method, &reading);
  if (status.ok()) reading.finish();
  return status;
}

}  // namespace thicken
