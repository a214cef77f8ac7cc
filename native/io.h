#pragma once

#include <cstddef>
#include <cstdint>

#include "status.h"

namespace thicken {

/// Reads exactly `range.length` bytes (pread(2)), continuing after short reads. `got` is less only
/// at the end of the file.
Status readFully(int fd, Range range, void* data, size_t* got);

/// Writes zeros over `range` (pwrite(2) from the shared buffer), counting each call in `work`.
Status writeZeros(int fd, Range range, Work* work);

/// Has the disk begin with what lies in the page cache (sync_file_range(2)), and goes on. A hint:
/// the kernel keeps what goes wrong for the sync that is to follow.
void startWriteback(int fd, Range range);

/// The same, and waits until it is written.
Status finishWriteback(int fd, Range range);

/// One aligned scratch buffer a thread, kept for the thread's life; nullptr without memory.
constexpr size_t kScratchSize = 1u << 20;
void* scratchBuffer();

}  // namespace thicken
