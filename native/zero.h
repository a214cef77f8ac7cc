#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "status.h"

namespace thicken {

/// True when every byte is zero; at memory speed.
bool isZero(const void* data, size_t length);

/// Appends to `runs` the ranges of `data` in which whole units of `granularity` bytes are zero
/// (the last unit may be shorter), as offsets from `base`. A run that continues the last one of
/// `runs` extends it. Returns the number of bytes found to be zero.
uint64_t findZeroRuns(const void* data, size_t length, size_t granularity, uint64_t base,
                      std::vector<Range>* runs);

/// The one zero-filled source of every zero-write: page-aligned, read-only, shared by all threads.
constexpr size_t kZeroBufferSize = 8u << 20;
const void* zeroBuffer();

}  // namespace thicken
