#include "device.h"

#include <linux/fs.h>
#include <linux/loop.h>
#include <sys/ioctl.h>

#include <algorithm>

#include "io.h"
#include "zero.h"

namespace thicken {
namespace {

Status zeroOut(int fd, Range run, Work* work) {
  uint64_t argument[2] = {run.offset, run.length};
  int result;
  do result = ioctl(fd, BLKZEROOUT, argument);
  while (result < 0 && errno == EINTR);
  if (result < 0) return Status::failed("ioctl(BLKZEROOUT)", run.offset, run.length);
  work->allocated += run.length;
  work->requests++;
  return {};
}

// The read and the write of one part follow each other at once: no other part is read in between,
// so that the time in which a foreign write could be missed is as short as it can be.
Status allocatePart(int fd, DeviceMode mode, uint64_t granularity, Range part, Work* work) {
  thread_local std::vector<Range> runs;
  runs.clear();
  size_t got = 0;
  Status status = readFully(fd, part, scratchBuffer(), &got);
  if (!status.ok()) return status;
  if (got < part.length) return Status{ESTALE, "pread", part.offset, part.length};
  const uint64_t zero = findZeroRuns(scratchBuffer(), got, granularity, part.offset, &runs);
  work->skipped += part.length - zero;
  for (const Range& run : runs) {
    status = mode == DeviceMode::zeroOut ? zeroOut(fd, run, work) : writeZeros(fd, run, work);
    if (!status.ok()) return status;
  }
  return {};
}

}  // namespace

Status readDeviceFacts(int fd, DeviceFacts* facts) {
  int logical = 0;
  unsigned physical = 0;
  int readOnly = 0;
  if (ioctl(fd, BLKGETSIZE64, &facts->size) < 0) return Status::failed("ioctl(BLKGETSIZE64)");
  if (ioctl(fd, BLKSSZGET, &logical) < 0) return Status::failed("ioctl(BLKSSZGET)");
  if (ioctl(fd, BLKPBSZGET, &physical) < 0) return Status::failed("ioctl(BLKPBSZGET)");
  if (ioctl(fd, BLKROGET, &readOnly) < 0) return Status::failed("ioctl(BLKROGET)");
  facts->logicalSector = static_cast<uint32_t>(logical);
  facts->physicalSector = physical;
  facts->readOnly = readOnly != 0;
  return {};
}

Status allocateDeviceRanges(int fd, DeviceMode mode, uint64_t granularity, OpenGate* gate,
                            const std::vector<Range>& ranges, const CancelFlag& cancel,
                            Work* work) {
  for (const Range& range : ranges) {
    for (uint64_t at = range.offset; at < range.end();) {
      if (cancel.isSet()) {
        work->cancelled = true;
        return {};
      }
      const GatePass pass(gate);
      if (!pass.granted()) {
        work->disturbed = true;
        return {};
      }
      const Range part{at, std::min<uint64_t>(range.end() - at, kScratchSize)};
      Status status = allocatePart(fd, mode, granularity, part, work);
      if (!status.ok()) return status;
      at += part.length;
    }
  }
  return {};
}

Status readLoopFacts(int fd, LoopFacts* facts) {
  loop_info64 info{};
  if (ioctl(fd, LOOP_GET_STATUS64, &info) < 0) {
    // ENOTTY and EINVAL: some other driver; ENXIO: a loop device without a file.
    if (errno == ENOTTY || errno == EINVAL || errno == ENXIO) return {};
    return Status::failed("ioctl(LOOP_GET_STATUS64)");
  }
  facts->isLoop = true;
  facts->device = info.lo_device;
  facts->inode = info.lo_inode;
  facts->blockDevice = info.lo_rdevice;
  facts->offset = info.lo_offset;
  facts->sizeLimit = info.lo_sizelimit;
  return {};
}

}  // namespace thicken
