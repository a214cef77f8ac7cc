#include "lock.h"

#include <fcntl.h>

#include <csignal>

namespace thicken {
namespace {

struct flock lockOn(uint64_t byte, short type) {
  struct flock lock {};
  lock.l_type = type;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(byte);
  lock.l_len = 1;
  return lock;
}

Status setLock(int fd, short type, uint64_t byte) {
  struct flock lock = lockOn(byte, type);
  if (fcntl(fd, F_OFD_SETLK, &lock) < 0) return Status::failed("fcntl(F_OFD_SETLK)", byte, 1);
  return {};
}

}  // namespace

Status takeLocks(int fd, const std::vector<uint64_t>& bytes) {
  for (size_t i = 0; i < bytes.size(); i++) {
    Status status = setLock(fd, F_RDLCK, bytes[i]);
    if (status.ok()) continue;
    releaseLocks(fd, std::vector<uint64_t>(bytes.begin(), bytes.begin() + static_cast<long>(i)));
    return status;
  }
  return {};
}

Status releaseLocks(int fd, const std::vector<uint64_t>& bytes) {
  Status first;
  for (uint64_t byte : bytes) {
    Status status = setLock(fd, F_UNLCK, byte);
    if (first.ok()) first = status;
  }
  return first;
}

Status probeLocks(int fd, const std::vector<uint64_t>& bytes, std::vector<uint64_t>* held) {
  for (uint64_t byte : bytes) {
    struct flock lock = lockOn(byte, F_WRLCK);
    if (fcntl(fd, F_OFD_GETLK, &lock) < 0) return Status::failed("fcntl(F_OFD_GETLK)", byte, 1);
    if (lock.l_type != F_UNLCK) held->push_back(byte);
  }
  return {};
}

Status probeWriter(int fd, bool* writer) {
  *writer = false;
  // Somebody who opens the file while the lease stands makes the kernel signal us; SIGIO, the
  // default, would end the process, SIGURG is ignored by default.
  if (fcntl(fd, F_SETSIG, SIGURG) < 0) return Status::failed("fcntl(F_SETSIG)");
  if (fcntl(fd, F_SETLEASE, F_RDLCK) < 0) {
    if (errno != EAGAIN) return Status::failed("fcntl(F_SETLEASE)");
    *writer = true;
    return {};
  }
  if (fcntl(fd, F_SETLEASE, F_UNLCK) < 0) return Status::failed("fcntl(F_SETLEASE)");
  return {};
}

}  // namespace thicken
