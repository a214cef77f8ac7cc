#include "peer.h"

#include <sys/socket.h>

namespace thicken {

Status readPeer(int fd, PeerCredentials* peer) {
  // The kernel answers for other families too: with pid 0 and nobody's numbers.
  int domain = 0;
  socklen_t size = sizeof(domain);
  if (getsockopt(fd, SOL_SOCKET, SO_DOMAIN, &domain, &size) != 0) {
    return Status::failed("getsockopt");
  }
  if (domain != AF_UNIX) return Status{EOPNOTSUPP, "getsockopt", 0, 0};
  struct ucred credentials {};
  size = sizeof(credentials);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return Status::failed("getsockopt");
  }
  *peer = {credentials.pid, credentials.uid, credentials.gid};
  return {};
}

}  // namespace thicken
