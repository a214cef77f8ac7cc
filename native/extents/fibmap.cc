#include <linux/fs.h>
#include <sys/ioctl.h>

#include <algorithm>
#include <climits>

#include "readers.h"

namespace thicken {

Status readFibmap(Reading* reading) {
  int blockSize = 0;
  if (ioctl(reading->fd, FIGETBSZ, &blockSize) < 0) return Status::failed("ioctl(FIGETBSZ)");
  if (blockSize <= 0) return Status{EINVAL, "ioctl(FIGETBSZ)"};
  const uint64_t block = static_cast<uint64_t>(blockSize);
  while (reading->goesOn()) {
    const Range rest = reading->rest();
    const uint64_t index = rest.offset / block;
    if (index > INT_MAX) return Status{EFBIG, "ioctl(FIBMAP)", rest.offset, rest.length};
    int number = static_cast<int>(index);
    if (ioctl(reading->fd, FIBMAP, &number) < 0)
      return Status::failed("ioctl(FIBMAP)", rest.offset, rest.length);
    reading->add(std::min((index + 1) * block, reading->end),
                 number == 0 ? HostState::hole : HostState::written, 0);
  }
  return {};
}

}  // namespace thicken
