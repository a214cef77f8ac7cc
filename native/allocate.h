#pragma once

#include <cstdint>
#include <vector>

#include "cancel.h"
#include "gate.h"
#include "status.h"

namespace thicken {

enum class FallocateMode : uint8_t { reserve = 0, unshare = 1 };

/// Of a file that grows meanwhile.
constexpr uint64_t kAnySize = 0;

struct Fallocate {
  int fd = -1;
  FallocateMode mode = FallocateMode::reserve;
  uint64_t expectedSize = kAnySize;  ///< the file's; a different one ends the call with ESTALE
  size_t rangesPerCall = 1;          ///< neighbours that one system call spans
};

/// fallocate(2) with FALLOC_FL_KEEP_SIZE: never changes data or size, and is atomic against writers
/// in the kernel. `unshare` adds FALLOC_FL_UNSHARE_RANGE (xfs, Linux 4.16). Ranges ascend; what
/// lies between those that share a call has its blocks, and keeps them. Blocks past a new end of
/// the file would serve nobody: hence the check of its size.
Status fallocateRanges(const Fallocate& options, const std::vector<Range>& ranges,
                       const CancelFlag& cancel, Work* work);

struct ZeroWrite {
  int bufferedFd = -1;
  int directFd = -1;             ///< opened with O_DIRECT; -1 where that does not work
  uint64_t directAlignment = 0;  ///< offsets and lengths of direct requests are multiples of it
  uint64_t directMinimum = 0;    ///< shorter ranges are written through the page cache
  uint64_t granularity = 0;      ///< unit of the decision to write or to leave alone
  uint64_t expectedSize = 0;     ///< the file's size; a different one ends the call with ESTALE
  OpenGate* gate = nullptr;      ///< passed for each piece; work ends where it is shut
  Range settle;                  ///< written by an earlier call: on the disk when this returns
};

/// Writes zeros over each range, having read it back just before: what is not zero by then is left
/// alone and counted as skipped. The caller holds the locks. Never extends the file. What went
/// through the page cache is on its way to the disk when this returns; the caller bounds dirty
/// memory by settling it in a later call, which meanwhile keeps the disk busy.
Status zeroWriteRanges(const ZeroWrite& options, const std::vector<Range>& ranges,
                       const CancelFlag& cancel, Work* work);

}  // namespace thicken
