#pragma once

#include <cstdint>

#include "status.h"

namespace thicken {

/// Who is at the other end of a UNIX socket: the process that connected, or that called listen(2).
struct PeerCredentials {
  int64_t pid = 0;  ///< 0: not visible in this process's pid namespace
  uint32_t uid = 0;
  uint32_t gid = 0;
};

/// getsockopt(2), SO_PEERCRED. Fails with EOPNOTSUPP on a socket of another kind.
Status readPeer(int fd, PeerCredentials* peer);

}  // namespace thicken
