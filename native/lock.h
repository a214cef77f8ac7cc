#pragma once

#include <cstdint>
#include <vector>

#include "status.h"

namespace thicken {

/// Shared open-file-description locks on single bytes (fcntl(2), F_OFD_SETLK): QEMU's image locks
/// (block/file-posix.c, since QEMU 2.10) are of this kind.
Status takeLocks(int fd, const std::vector<uint64_t>& bytes);
Status releaseLocks(int fd, const std::vector<uint64_t>& bytes);

/// Which of `bytes` somebody else holds, shared or exclusive. Probes with F_WRLCK: against
/// F_RDLCK a shared lock, which is all that QEMU takes, does not show.
Status probeLocks(int fd, const std::vector<uint64_t>& bytes, std::vector<uint64_t>* held);

/// Whether somebody has the file open for writing, or may: F_SETLEASE of a read lease, given back
/// at once. `fd` must be open read-only, and this process must not have it open for writing.
/// Sets `writer`; fails where the file system has no leases or the caller may not take one.
Status probeWriter(int fd, bool* writer);

}  // namespace thicken
