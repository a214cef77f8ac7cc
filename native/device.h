#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cancel.h"
#include "gate.h"
#include "status.h"

namespace thicken {

struct DeviceFacts {
  uint64_t size = 0;            ///< bytes (BLKGETSIZE64)
  uint32_t logicalSector = 0;   ///< bytes (BLKSSZGET): the unit of every request
  uint32_t physicalSector = 0;  ///< bytes (BLKPBSZGET)
  bool readOnly = false;        ///< BLKROGET
};

Status readDeviceFacts(int fd, DeviceFacts* facts);

enum class DeviceMode : uint8_t { zeroOut = 0, write = 1 };

/// Reads each range and, where whole units of `granularity` bytes are zero, makes the device back
/// them: BLKZEROOUT (the kernel may not unmap: linux/blkdev.h, BLKDEV_ZERO_NOUNMAP), or written
/// zeros. Whatever is not zero is left alone and counted as skipped. `fd` is open with O_DIRECT
/// and O_EXCL; ranges and granularity are multiples of the logical sector.
Status allocateDeviceRanges(int fd, DeviceMode mode, uint64_t granularity, OpenGate* gate,
                            const std::vector<Range>& ranges, const CancelFlag& cancel, Work* work);

/// The file behind a loop device (LOOP_GET_STATUS64). `device` and `inode` identify it.
struct LoopFacts {
  bool isLoop = false;
  uint64_t device = 0;
  uint64_t inode = 0;
  uint64_t blockDevice = 0;  ///< of a loop over a block device: the device's number
  uint64_t offset = 0;       ///< bytes into the file where the device starts
  uint64_t sizeLimit = 0;    ///< bytes; 0: to the end of the file
};

Status readLoopFacts(int fd, LoopFacts* facts);

}  // namespace thicken
