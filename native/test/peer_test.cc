#include "../peer.h"

#include <sys/socket.h>
#include <unistd.h>

#include "check.h"
#include "temporary_file.h"

using thicken::PeerCredentials;
using thicken::readPeer;
using thicken::Status;

TEST(peerOfASocketPairIsThisProcess) {
  int ends[2];
  thicken_test::require(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0, "socketpair");
  PeerCredentials peer;
  CHECK(readPeer(ends[0], &peer).ok());
  CHECK(peer.pid == getpid());
  CHECK(peer.uid == geteuid());
  CHECK(peer.gid == getegid());
  close(ends[0]);
  close(ends[1]);
}

TEST(peerOfAnInternetSocketIsUnknown) {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  thicken_test::require(fd >= 0, "socket");
  PeerCredentials peer;
  CHECK(readPeer(fd, &peer).error == EOPNOTSUPP);
  close(fd);
}

TEST(peerOfAFileIsAnError) {
  thicken_test::TemporaryFile file;
  PeerCredentials peer;
  CHECK(readPeer(file.fd(), &peer).error == ENOTSOCK);
  CHECK(readPeer(-1, &peer).error == EBADF);
}
